"""The search of rates in a grid: whose rate a rule gets, what is told of it, and what happens where there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_grid import TINY
from test_grid_report import block, results, rule

from feedbackward.cli import main
from feedbackward.experiment.report.tables import notes, rates

SEARCH = {"run": True, "baseline_only": True, "lr": [1e-7, 0.05], "seed": 7, "epochs": 1}


def run(*more: str, workers: int = 1, **changes: Any) -> int:
    given = {**TINY, "sections": [{"name": "main"}], "search": SEARCH, **changes}
    Path("data").mkdir(exist_ok=True)
    Path("study.yaml").write_text(yaml.safe_dump(given))
    return main(
        [
            "compare",
            "--config",
            "study.yaml",
            "--data-root",
            "data",
            "--out",
            "out",
            "--workers",
            str(workers),
            *more,
        ]
    )


def found_rates() -> dict[str, float]:
    document = json.loads(Path("out/results.json").read_text())
    (table,) = document["sections"][0]["tables"]
    return {one["label"]: one["rates"]["lr"] for one in table["blocks"][0]["rules"]}


def told() -> str:
    return Path("out/report.md").read_text()


def test_the_rate_of_all_rules_is_picked_for_the_first(home: Path) -> None:
    """Whatever part is run: the trials that it needs are the first rule's."""
    assert run("--only.rules", "Frozen", "--only.seeds", "1") == 0
    trials = sorted(path.parent.name for path in Path("out").rglob("search/*/result.json"))
    assert trials == ["bp-0.05", "bp-1e-07"]
    assert found_rates() == {"BP": 0.05, "Frozen": 0.05}
    assert "| BP | 0.05 | – | picked of 2 in main/all |" in told()
    assert "| Frozen | 0.05 | – | that of BP |" in told()
    assert "W's rate was picked for the first rule" in told()


@pytest.mark.nightly
def test_rates_are_told_as_the_runs_had_them(home: Path) -> None:
    """The file has changed since: nothing is run, and nothing is told that was not."""
    assert run("--only.seeds", "0") == 0
    assert (
        run(
            "--report-only", search={"run": False}, rates={"bp": {"lr": 0.3}, "frozen": {"lr": 0.4}}
        )
        == 0
    )
    assert found_rates() == {"BP": 0.05, "Frozen": 0.05}
    assert run("--report-only", search={**SEARCH, "lr": [0.02, 0.4]}) == 0
    assert found_rates() == {"BP": 0.05, "Frozen": 0.05}
    assert "picked" not in told()
    assert (
        run("--only.seeds", "0", search={**SEARCH, "lr": [1e-8, 1e-7, 0.05]}) == 0
    )  # a grid can grow
    assert "picked of 3 in main/all" in told()


@pytest.mark.nightly
def test_a_rule_that_is_run_anew_leaves_the_trials_of_another(home: Path) -> None:
    assert run("--only.seeds", "0") == 0
    files = {
        name: Path("out/main/all") / name / "result.json"
        for name in ("frozen-s0", "search/bp-0.05")
    }
    before = {name: file.stat().st_mtime_ns for name, file in files.items()}
    assert run("--only.rules", "Frozen", "--only.seeds", "0", "--overwrite") == 0
    after = {name: file.stat().st_mtime_ns for name, file in files.items()}
    assert after["search/bp-0.05"] == before["search/bp-0.05"]
    assert after["frozen-s0"] > before["frozen-s0"]
    assert run("--only.rules", "BP", "--only.seeds", "0", "--overwrite") == 0
    assert files["search/bp-0.05"].stat().st_mtime_ns > before["search/bp-0.05"]


def test_without_a_search_that_came_to_an_end_nothing_is_trained(home: Path, capsys: Any) -> None:
    """A trial that fails: nobody trains at another rate, and the command says so."""
    nets = {"model": "test_grid_report:dying", "rules": ["bp", "frozen"]}
    assert run(workers=2, **nets) == 1
    shown = capsys.readouterr()
    assert (
        "main/all, Frozen: not run, because its search of rates did not come to an end" in shown.out
    )
    assert "2 cells or trials failed" in shown.err
    assert not [*Path("out").rglob("result.json")]


def test_a_search_without_data_gives_no_rate(home: Path, capsys: Any) -> None:
    sections = [{"name": "main", "axes": {"data.name": ["fashion-mini", "cifar100"]}}]
    assert run(sections=sections, search_on={"data.name": "cifar100"}) == 0
    assert "fashion-mini, BP: not run, because its search" in capsys.readouterr().out
    assert not [*Path("out").rglob("result.json")]


def test_the_sentence_about_rates_says_no_more_than_is_so() -> None:
    own = {"searched": "main/a", "search": [{}, {}]}
    first, other = {**own, "baseline_only": True}, {"follows": "BP", "baseline_only": True}

    def sentence(*rules: dict[str, Any]) -> str:
        document = results()
        made = [rule(f"r{i}", [80.0, 81.0], **more) for i, more in enumerate(rules)]
        document["sections"][0]["tables"][0]["blocks"] = [block("a", made)]
        assert [row[-1] for row in rates(document)][-1] in (
            "config",
            "picked of 2 in main/a",
            "that of BP",
        )
        return notes(document)[-1]

    assert "no search was made" in sentence({})
    assert "equal trials for every rule" in sentence(own, own)
    assert sentence(first) == sentence(other) == sentence(first, other)
    assert "all others have the same one" in sentence(first, other)
    assert sentence(own, {}) == sentence(first, own) == sentence(other, {})
    assert "for each rule, whether" in sentence(own, {})
