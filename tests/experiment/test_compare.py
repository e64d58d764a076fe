"""Comparisons: what is skipped, resumed and gathered; the search of rates; divergence and foreign folders."""

import json
import math
from dataclasses import dataclass, replace

import pytest
from rich.console import Console
from test_train import DATA, StopAfter

from feedbackward import DKP, RULES
from feedbackward.errors import AttachError, ConfigError, FeedbackError
from feedbackward.experiment.config.recipes import find_recipe
from feedbackward.experiment.config.schema import CompareConfig, RuleEntry, Search
from feedbackward.experiment.grid.compare import compare
from feedbackward.experiment.report.report import write_report
from feedbackward.experiment.report.tables import detailed as table
from feedbackward.experiment.training.interrupts import InterruptedRunError, Interrupts
from feedbackward.experiment.training.run import Run


@pytest.fixture
def comparison(tmp_path):
    return CompareConfig(
        model="test_train:Net", data=DATA, epochs=2, batch_size=16, probe_images=20, tensorboard=False,
        rules=["dkp", "bp", RuleEntry(rule="dkp", options={"center": True}, lr=0.01)], seeds=[0, 1],
        timing_steps=2, out=str(tmp_path / "compare"),
    )  # fmt: skip


def compared(settings, interrupts=None):
    return compare(settings, Console(quiet=True), interrupts or Interrupts())


def test_a_comparison_goes_on_where_it_stopped_and_gathers_everything(comparison, tmp_path):
    with pytest.raises(InterruptedRunError):
        compared(comparison, StopAfter(40))
    before = {
        f.parent.name: f.stat().st_mtime_ns for f in (tmp_path / "compare").glob("*/result.json")
    }
    assert before
    results = compared(comparison)
    after = {
        f.parent.name: f.stat().st_mtime_ns for f in (tmp_path / "compare").glob("*/result.json")
    }
    assert before.items() <= after.items()
    assert len(after) == 6
    assert [rule["label"] for rule in results["rules"]] == ["BP", "DKP", "DKP (center=True)"]
    bp, dkp, centred = results["rules"]
    assert (bp["step_ratio"], bp["peak_ratio"], bp["feedback_bytes"]) == (1.0, 1.0, 0)
    assert bp["rates"] == {"lr": find_recipe("default").rates["bp"].lr, "feedback_lr": None}
    assert centred["rates"] == {
        "lr": 0.01,
        "feedback_lr": find_recipe("default").rates["dkp"].feedback_lr,
    }
    assert dkp["feedback_bytes"] == 4 * 3 * sum(math.prod(shape) for shape in ((4, 6, 6), (12,)))
    for rule in results["rules"]:
        assert [r["seed"] for r in rule["runs"]] == [0, 1]
        for cell in rule["runs"]:
            assert cell["status"] == "done"
            assert [row["epoch"] for row in cell["epochs"]] == [1, 2]
            assert [row["epoch"] for row in cell["alignment"]] == [0, 1, 2]
            assert set(cell["alignment"][0]["sites"]) == set(results["sites"])
            assert cell["validation_accuracy"] == cell["epochs"][-1]["validation_accuracy"]
    angles = [m["angle"] for row in bp["runs"][0]["alignment"] for m in row["sites"].values()]
    assert angles == pytest.approx([0.0] * len(angles), abs=1e-2)
    json.dumps(results, allow_nan=False)


def test_one_diverging_rule_does_not_stop_the_others(comparison):
    wild = RuleEntry(rule="dfa", lr=1e30)
    results = compared(replace(comparison, rules=["bp", wild], seeds=[0], epochs=1, timing_steps=0))
    bp, dfa = (rule["runs"][0] for rule in results["rules"])
    assert (bp["status"], dfa["status"], dfa["test_accuracy"]) == ("done", "diverged", None)
    assert "--forward.lr" in dfa["message"]


def refuser(name):
    """A rule that a net refuses, or that a step of it does."""

    @dataclass(frozen=True)
    class Refused(DKP):
        label = "Refuser"

        def graph(self, sites, source):
            if name == "attach":
                raise AttachError("nothing here is round: use a round net.")
            return super().graph(sites, source)

        def message(self, edge, d, target, activity):
            if name == "diverges":
                return d * math.inf
            raise FeedbackError("the batch is odd: use an even one.")

    return Refused


@pytest.mark.parametrize(
    ("when", "reason"), [("attach", "nothing here is round"), ("step", "the batch is odd")]
)
def test_what_the_net_refuses_is_told_and_the_others_run(
    comparison, tmp_path, monkeypatch, when, reason
):
    monkeypatch.setitem(RULES, "refuser", refuser(when))
    search = Search(run=True, lr=[0.05], feedback_lr=[0.05], epochs=1)
    settings = replace(comparison, rules=["refuser", "bp"], seeds=[0], epochs=1, search=search)
    results = compared(settings)
    bp, refused = results["rules"]
    assert bp["runs"][0]["status"] == "done"
    assert bp["step_ratio"] == 1.0
    assert refused["runs"] == []
    assert refused["refused"].startswith(reason)
    paths = write_report(results, tmp_path / "report")
    assert f"Refuser was refused: {reason}" in paths["report.md"].read_text()
    assert f"Refuser was refused: {reason}" in paths["report.html"].read_text()
    assert table(results)["Test accuracy (%)"][1] == "refused"
    with pytest.raises(AttachError, match=f"every rule is refused; Refuser: {reason}"):
        compared(replace(settings, rules=["refuser"], out=str(tmp_path / "alone")))


def test_a_rule_whose_every_trial_diverges_does_not_stop_the_others(comparison, monkeypatch):
    monkeypatch.setitem(RULES, "refuser", refuser("diverges"))
    search = Search(run=True, lr=[0.05], feedback_lr=[0.05], epochs=1)
    settings = replace(comparison, rules=["bp", "refuser"], seeds=[0], epochs=1, search=search)
    bp, wild = compared(replace(settings, timing_steps=0))["rules"]
    assert bp["runs"][0]["status"] == "done"
    assert "every trial of Refuser diverged" in wild["refused"]


def test_the_baselines_search_can_pick_the_rate_of_all(comparison):
    """Only the first rule is searched, at the rates that are given; B keeps the rate that it has without a search."""
    search = Search(run=True, lr=[1e-7, 0.05, 0.1], epochs=1, baseline_only=True)
    settings = replace(
        comparison,
        rules=["bp", "dkp", "frozen"],
        seeds=[0],
        epochs=1,
        search=search,
        timing_steps=0,
    )
    bp, dkp, frozen = compared(settings)["rules"]
    assert [trial["lr"] for trial in bp["search"]] == [1e-7, 0.05, 0.1]
    assert bp["rates"]["lr"] == dkp["rates"]["lr"] == frozen["rates"]["lr"] != 1e-7
    assert dkp["search"] == frozen["search"] == []
    plain = replace(settings, rules=["dkp"], search=Search())
    assert (
        dkp["rates"]["feedback_lr"]
        == plain.resolved().cell(RuleEntry(rule="dkp"), 0).resolved().feedback.lr
    )


def test_without_the_baselines_rate_the_others_have_none(comparison, monkeypatch):
    monkeypatch.setitem(RULES, "refuser", refuser("diverges"))
    search = Search(run=True, lr=[0.05], epochs=1, baseline_only=True)
    settings = replace(comparison, rules=["refuser", "frozen"], seeds=[0], epochs=1, search=search)
    with pytest.raises(AttachError, match="every trial of Refuser diverged"):
        compared(replace(settings, timing_steps=0))


def test_a_refused_baseline_is_not_replaced_by_another_rule(comparison, monkeypatch):
    monkeypatch.setitem(RULES, "refuser", refuser("attach"))
    search = Search(run=True, lr=[0.05], epochs=1, baseline_only=True)
    settings = replace(comparison, rules=["refuser", "frozen"], seeds=[0], epochs=1, search=search)
    with pytest.raises(AttachError, match="every rule is refused; Refuser: nothing here is round"):
        compared(settings)


def test_all_stands_for_every_rule(comparison):
    settings = replace(
        comparison, rules=["all", RuleEntry(rule="dkp", options={"center": True})]
    ).resolved()
    assert [entry.rule for entry in settings.rules] == [*RULES, "dkp"]
    assert settings.resolved() == settings
    with pytest.raises(ConfigError, match="none twice"):
        replace(comparison, rules=["all", "dkp"]).resolved()


def test_the_search_picks_rates_on_held_out_images_only(comparison, tmp_path, monkeypatch):
    search = Search(run=True, lr=[1e-7, 0.05], feedback_lr=[1e-6, 0.05], epochs=2)
    seen = []
    evaluate = Run.evaluate

    def spy(self, images, check=None):
        seen.append((self.config.out, images is self.data.test))
        return evaluate(self, images, check)

    monkeypatch.setattr(Run, "evaluate", spy)
    settings = replace(comparison, rules=["bp", "dkp"], seeds=[0], search=search, timing_steps=0)
    results = compared(settings)
    assert not any(test for out, test in seen if "/search/" in out)
    assert sum(test for _, test in seen) == 2
    for rule in results["rules"]:
        assert len(rule["search"]) == 4
        best = max(trial["validation_accuracy"] for trial in rule["search"])
        chosen = next(trial for trial in rule["search"] if trial["validation_accuracy"] == best)
        assert rule["rates"] == {key: pytest.approx(chosen[key]) for key in ("lr", "feedback_lr")}
    count = len(seen)
    compared(settings)
    assert len(seen) == count


def test_overwriting_replaces_every_cell_even_if_it_is_stopped(comparison, tmp_path):
    settings = replace(comparison, rules=["bp"], timing_steps=0)
    compared(settings)
    with pytest.raises(ConfigError, match=r"another config \(epochs: 2 -> 1\).* --overwrite"):
        compared(replace(settings, epochs=1))
    changed = replace(settings, epochs=1, overwrite=True)
    with pytest.raises(InterruptedRunError):
        compared(changed, StopAfter(4))
    results = compared(replace(changed, overwrite=False))
    assert [len(run["epochs"]) for run in results["rules"][0]["runs"]] == [1, 1]


def test_labels_must_differ_and_foreign_folders_are_kept(comparison, tmp_path):
    twice = [RuleEntry(rule="dkp", lr=0.1), RuleEntry(rule="dkp", lr=0.2)]
    with pytest.raises(ConfigError, match="two rules have the label 'DKP'"):
        compared(replace(comparison, rules=twice))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="not the folder of a comparison"):
        compared(replace(comparison, out=str(tmp_path / "other")))
