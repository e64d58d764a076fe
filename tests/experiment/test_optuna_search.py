"""Rates that Optuna suggests: equal trials, the same again, pruned by what is known, on held-out data alone."""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_compare import compared
from test_train import DATA, StopAfter

from feedbackward.errors import ConfigError
from feedbackward.experiment.config.schema import CompareConfig, Search, TrainConfig
from feedbackward.experiment.grid.cells import run_record
from feedbackward.experiment.grid.optuna_search import Pruning
from feedbackward.experiment.report.tables import as_grid, rates
from feedbackward.experiment.training.interrupts import InterruptedRunError
from feedbackward.experiment.training.run import Run

pytest.importorskip("optuna", reason="needs optuna: see the extra `search`")

SEARCH = Search(
    run=True, by="optuna", lr=[1e-5, 0.1], feedback_lr=[1e-4, 0.1], trials=8, epochs=2, seed=3
)


@pytest.fixture
def settings(tmp_path: Path) -> CompareConfig:
    return CompareConfig(
        model="test_train:Net", data=DATA, epochs=1, batch_size=16, tensorboard=False, probe_every=0,
        rules=["bp", "dkp"], seeds=[0], timing_steps=0, search=SEARCH, out=str(tmp_path / "whole"),
    )  # fmt: skip


def found(results: Any) -> dict[str, Any]:
    return {rule["label"]: (rule["search"], rule["rates"]) for rule in results["rules"]}


def test_a_search_ends_as_it_would_have_when_it_is_stopped(
    settings: CompareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tested = []
    evaluate = Run.evaluate

    def spy(self: Run, images: Any, check: Any = None) -> Any:
        tested.append((str(self.config.out), images is self.data.test))
        return evaluate(self, images, check)

    monkeypatch.setattr(Run, "evaluate", spy)
    whole = compared(settings)
    assert not any(test for out, test in tested if "/search/" in out)
    statuses = set()
    for rule, learned in zip(whole["rules"], (False, True), strict=True):
        trials = rule["search"]
        assert len({trial["lr"] for trial in trials}) == SEARCH.trials
        for trial in trials:
            statuses.add(trial["status"])
            assert 1e-5 <= trial["lr"] <= 0.1
            assert (trial["feedback_lr"] is not None) == learned
            assert (trial["validation_accuracy"] is not None) == (trial["status"] == "done")
        # evenly on a logarithmic scale: a linear one would have one in a hundred of them below
        assert any(trial["lr"] < 1e-3 for trial in trials[:5])
        best = max(t["validation_accuracy"] for t in trials if t["status"] == "done")
        chosen = next(t for t in trials if t["validation_accuracy"] == best)
        assert rule["rates"] == {key: pytest.approx(chosen[key]) for key in ("lr", "feedback_lr")}
    assert statuses == {"done", "pruned"}
    assert "pruned) in search" in " ".join(row[-1] for row in rates(as_grid(whole)))
    again = replace(settings, out=str(tmp_path / "parts"))
    with pytest.raises(InterruptedRunError):
        compared(again, StopAfter(60))
    assert found(compared(again)) == found(whole)
    tested.clear()
    assert found(compared(settings)) == found(whole)  # nothing is run again
    assert not tested


def test_a_pruned_trial_has_not_gone_on(settings: CompareConfig) -> None:
    """What is kept of it is what the trials before it decided, by the median of the whole ones."""
    results = compared(replace(settings, rules=["bp"], search=replace(SEARCH, trials=12)))
    (bp,) = results["rules"]
    folders = sorted(Path(str(settings.out)).glob("search/bp-*-median/result.json"))
    assert len(folders) == 12
    curves = {}
    for file in folders:
        rows = [json.loads(line) for line in (file.parent / "metrics.jsonl").open()]
        curves[float(file.parent.name.split("-", 1)[1].removesuffix("-median"))] = [
            row["validation_accuracy"] for row in rows
        ]
    whole: list[list[float]] = []
    for trial in bp["search"]:
        curve = curves[trial["lr"]]
        ends = len(whole) >= 5 and curve[0] < statistics.median(c[0] for c in whole)
        assert len(curve) == (1 if ends else 2)
        assert trial["status"] == ("pruned" if ends else "done")
        whole += [] if ends else [curve]


@pytest.mark.parametrize("task", ["classification", "language_model"])
def test_the_median_prunes_what_is_worse_by_the_tasks_measure(task: str) -> None:
    config = TrainConfig(task=task, epochs=4)  # type: ignore[arg-type]
    key, sign = ("accuracy", 1) if task == "classification" else ("perplexity", -1)
    draws = np.random.default_rng(0)
    seen = set()
    for _ in range(50):
        earlier = sign * draws.uniform(0, 90, (6, 3))
        own = draws.uniform(0, 90, 3)
        pruning = Pruning("median", [("done", list(values)) for values in earlier])
        rows = [{f"validation_{key}": value} for value in own]
        expected = max(sign * own) < statistics.median(earlier[:, 2])
        reason = pruning.reason(config, rows)
        assert (reason is not None) == expected
        assert reason is None or f"{own[-1]:.{1 if sign > 0 else 2}f}" in reason
        seen.add(expected)
        few = Pruning("median", pruning.earlier[:4])
        assert few.reason(config, rows) is None
        assert Pruning("none", pruning.earlier).reason(config, rows) is None
    assert seen == {True, False}


def test_halving_keeps_the_better_half() -> None:
    config = TrainConfig(epochs=4)

    def kept(*own: float) -> bool:
        rows = [{"validation_accuracy": value} for value in own]
        return Pruning("halving", earlier).reason(config, rows) is None

    earlier = [("done", [50.0, 50.0]), ("pruned", [40.0]), ("pruned", [30.0])]
    assert kept(60.0)
    assert kept(45.0)  # the second of four
    assert not kept(35.0)
    # the third epoch is none at which a half is taken
    assert kept(60.0, 60.0, 1.0)
    assert not kept(60.0, 45.0)


def test_a_trial_that_diverged_is_the_worst(settings: CompareConfig) -> None:
    search = replace(SEARCH, lr=[1e-3, 1e30], trials=9, epochs=1)
    (bp,) = compared(replace(settings, rules=["bp"], search=search))["rules"]
    assert [trial["status"] for trial in bp["search"]].count("diverged") >= 3
    assert len(bp["search"]) == 9
    assert bp["rates"]["lr"] < 1e10


def test_equal_rates_are_tried_once(settings: CompareConfig) -> None:
    search = replace(SEARCH, lr=[0.05], epochs=1, trials=3)
    bp, dkp = compared(replace(settings, search=search))["rules"]
    assert (len(bp["search"]), len(dkp["search"])) == (1, 3)


def test_a_rules_trials_together_are_suggested_together(settings: CompareConfig) -> None:
    together = replace(SEARCH, at_once=4, epochs=1)
    (bp,) = compared(replace(settings, rules=["bp"], search=together))["rules"]
    assert len({trial["lr"] for trial in bp["search"]}) == 8


def test_a_trial_that_fails_ends_the_search(
    settings: CompareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No rates are picked from the others, and the same command goes on with it."""
    whole, steps = Run.step, []

    def step(self: Run, *given: Any) -> float:
        steps.append(1)
        if len(steps) == 30:
            raise RuntimeError("out of luck")
        return whole(self, *given)

    monkeypatch.setattr(Run, "step", step)
    (bp,) = compared(replace(settings, rules=["bp"]))["rules"]
    assert [run["status"] for run in bp["runs"]] == ["not run"]
    (bp,) = compared(replace(settings, rules=["bp"]))["rules"]
    assert len(bp["search"]) == 8
    assert [run["status"] for run in bp["runs"]] == ["done"]


def test_without_optuna_nothing_is_trained(
    settings: CompareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'feedbackward\[search\]'"):
        compared(settings)
    assert run_record(TrainConfig(out=str(settings.out)))["status"] == "not run"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"by": "grid"}, "search.trials is 8"),
        ({"trials": 0}, "trials is 0"),
        ({"at_once": 0}, "at_once is 0"),
        ({"lr": [0.0, 0.1]}, "above 0"),
        ({"feedback_lr": [-1.0, 0.1]}, "above 0"),
    ],
)
def test_a_search_that_cannot_be_made_is_refused(changes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CompareConfig(search=replace(SEARCH, **changes)).resolved()
    CompareConfig(search=replace(SEARCH, **changes, run=False)).resolved()
