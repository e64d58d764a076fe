"""What a study tells, from results made by hand; its estimates of time; cells that are stopped or die."""

from __future__ import annotations

import multiprocessing
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_grid import TINY
from test_report import Page
from test_train import StopAfter
from torch import nn

from feedbackward.cli import main
from feedbackward.experiment.grid.eta import CellTime, duration, seconds_left
from feedbackward.experiment.report.report import write_report
from feedbackward.experiment.report.tables import cell, head
from feedbackward.experiment.training import interrupts


def dying(in_shape: Any, classes: int) -> nn.Module:
    """A net whose making kills a worker, as the system does where memory is short."""
    if multiprocessing.parent_process() is not None:
        os._exit(9)
    return nn.Sequential(nn.Flatten(), nn.Linear(100, 8), nn.ReLU(), nn.Linear(8, classes))


def rule(name: str, accuracies: list[float | str | None], **more: Any) -> dict[str, Any]:
    """A rule with a run per seed: its accuracy, the state of one without, or None for not run."""
    runs = [
        {
            "seed": seed,
            "status": "done" if isinstance(found, float) else found or "not run",
            "message": "too hot" if found == "diverged" else "",
            "test_accuracy": found if isinstance(found, float) else None,
            "validation_accuracy": found if isinstance(found, float) else None,
            "seconds": 1.0,
            "epochs": [],
            "alignment": [
                {"epoch": 1, "sites": {f"a<b{i}": {"angle": 80.0 - i} for i in range(3)}}
            ],
        }
        for seed, found in enumerate(accuracies)
    ]
    return {
        "rule": name,
        "label": name.upper(),
        "rates": {"lr": 0.1},
        "search": [],
        "runs": runs,
        **more,
    }


def block(name: str, rules: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    data = {
        "name": name,
        "train": 2250,
        "whole": 45000,
        "official": 50000,
        "validation": 5000,
        "test": 1000,
    }
    return {
        "version": 1, "title": f"net, {name}", "column": name.upper(), "folder": f"main/{name}", "point": {}, "epochs": 3,
        "seeds": [0, 1], "missing": None, "data": data, "model": "net", "config": {"data": {"name": name}}, "sites": [],
        "rules": rules, **more,
    }  # fmt: skip


def results() -> dict[str, Any]:
    here = [
        rule("bp", [80.0, 82.0], cost={"steps": 8}),
        rule("dkp", [78.0, 79.0], cost={"steps": 1}, backward_steps=5, predict_weights=True),
        rule("dfa", [70.0, "diverged"]),
        rule("frozen", [None, None]),
        rule("fa", [], refused="the net is <odd> | round"),
    ]
    gone = [rule(name, [None, None]) for name in ("bp", "dkp", "dfa", "frozen", "fa")]
    blocks = [
        block("cifar-10", here),
        block("absent", gone, missing="fetch it with `hf`", data=None),
    ]
    table = {"title": "net <b>", "labels": ["BP", "DKP", "DFA", "FROZEN", "FA"], "blocks": blocks}
    sections = [{"name": "main", "title": "All", "about": "", "tables": [table]}]
    return {
        "version": 1, "study": "s", "title": "By hand", "about": "", "scale": 0.05, "sets": {}, "command": "feedbackward study s",
        "created": "2026-11-24T12:00:00", "environment": {"torch": "2.13"}, "sections": sections, "config": "title: By hand",
    }  # fmt: skip


def test_cells_say_mean_spread_gap_and_state() -> None:
    """BP 80, 82: std sqrt 2. BP minus DKP: 2, 3: mean 2.5, standard error sqrt(1/2) / sqrt 2. DFA: seed 0 alone, 10 behind."""
    found = results()["sections"][0]["tables"][0]["blocks"][0]
    told = {label: cell(found, label) for label in ("BP", "DKP", "DFA", "FROZEN", "FA")}
    assert (told["BP"]["text"], told["BP"]["gap"], told["BP"]["steps"]) == (
        "81.0 ± 1.4",
        "",
        "8 steps",
    )
    assert (told["DKP"]["text"], told["DKP"]["gap"]) == ("78.5 ± 0.7", "−2.5 ± 0.5")
    assert told["DKP"]["steps"] == "1 step"
    assert (told["DFA"]["text"], told["DFA"]["gap"]) == ("70.0 (1 of 2)", "−10.0")
    assert (told["FROZEN"]["text"], told["FA"]["text"]) == ("not run", "refused")
    assert cell(found, "KP")["text"] == "–"
    assert head(found) == "CIFAR-10 (2,250 images, 3 epochs, 2 seeds)"


def test_cells_have_the_digits_of_their_measure() -> None:
    """Perplexities 5.511, 5.563: mean 5.537, std 0.037; a rule at 7.212, 7.301 is 1.72 ± 0.02 behind."""
    found = results()["sections"][0]["tables"][0]["blocks"][0]
    for index, values in enumerate([(5.511, 5.563), (7.212, 7.301)]):
        for run, value in zip(found["rules"][index]["runs"], values, strict=True):
            run |= {"measure": "perplexity", "test_perplexity": value}
    found["rules"] = found["rules"][:2]
    assert cell(found, "BP")["text"] == "5.54 ± 0.04"
    assert (cell(found, "DKP")["text"], cell(found, "DKP")["gap"]) == (
        "7.26 ± 0.06",
        "−1.72 ± 0.02",
    )


def test_the_table_says_what_was_run_and_what_was_not(tmp_path: Path) -> None:
    text = write_report(results(), tmp_path)["report.md"].read_text()
    assert "| net &lt;b> | CIFAR-10 (2,250 images, 3 epochs, 2 seeds) | ABSENT (no data) |" in text
    assert "| DKP | 78.5 ± 0.7 (−2.5 ± 0.5) | no data |" in text
    assert "| DFA | 70.0 (1 of 2) (−10.0) | no data |" in text
    assert (
        "At scale 0.05: 5 % of the training images. Of 20 cells: 5 done, 1 diverged, 2 refused, 2 not run, 10 no data."
        in text
    )
    assert "No data for absent: fetch it with `hf`" in text
    assert "net, cifar-10, DFA, seed 1: diverged (too hot)" in text
    assert "DKP: an update waits for at most 5 products in sequence" in text
    assert "as in a pipeline, taken at weights predicted for then." in text
    assert "FA was refused: the net is &lt;odd> \\| round" in text
    assert "2026" not in text.split("## What to know")[0]  # results come first
    assert "- torch: 2.13" in text


def test_the_page_is_whole_and_loads_nothing(tmp_path: Path) -> None:
    text = write_report(results(), tmp_path)["report.html"].read_text()
    page = Page(text)  # every element is closed
    assert not {"script", "link", "iframe", "img"} & {tag for tag, _ in page.elements}
    assert "http:" not in text
    assert "https:" not in text
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([^")]+)', text)) <= set(ids)
    assert len(page.of("svg")) >= 4  # accuracies; angles by layer; their course for DKP and DFA
    assert "78.5 ± 0.7" in " ".join(page.text)
    again = tmp_path / "again"
    assert write_report(results(), again)["report.html"].read_text() == text


def test_time_left_is_read_from_the_likest_cell_that_ran() -> None:
    """0.5 s an image in f1, which stands for DKP there (50 s) and for the same net elsewhere (100 s)."""
    done = CellTime(("net", "a", "f1"), "BP", 100, share=1.0, measured=1.0, seconds=50.0)
    alike = CellTime(("net", "a", "f1"), "DKP", 100)
    elsewhere = CellTime(("net", "b", "f2"), "BP", 200)
    assert seconds_left([alike, elsewhere], 1) is None
    assert seconds_left([done, alike, elsewhere], 1) == pytest.approx(150)
    assert seconds_left([done, alike, elsewhere], 2) == pytest.approx(
        100
    )  # no sooner than its longest cell
    resumed = CellTime(
        ("net", "a", "f1"), "DKP", 100, share=0.5, measured=0.25, seconds=10.0
    )  # 0.4 s an image
    assert seconds_left([done, resumed], 1) == pytest.approx(20)
    assert seconds_left([done, resumed, alike], 1) == pytest.approx(20 + 40)


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "1 s"), (89, "89 s"), (300, "5 min"), (7500, "2 h 05 min")]
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def run(home: Path, out: str, workers: int = 1, **changes: Any) -> int:
    one = [{"name": "main", "axes": {"data.name": ["fashion-mini"]}}]
    (home / "study.yaml").write_text(yaml.safe_dump({**TINY, "sections": one, **changes}))
    return main(["compare", "--config", "study.yaml", "--out", out, "--workers", str(workers)])


def losses(folder: Path) -> dict[str, list[str]]:
    files = folder.rglob("metrics.jsonl")
    return {
        f.parent.name: re.findall(r'"(?:train|validation)_loss": [\d.e-]+', f.read_text())
        for f in files
    }


@pytest.mark.nightly
def test_a_study_that_is_stopped_goes_on_with_the_same_numbers(
    home: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped within its second cell: the first is kept as it is, the second resumes, and the numbers are those of one go."""
    assert run(home, "whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(interrupts, "Interrupts", lambda: StopAfter(13))
        assert run(home, "out") == 130
    assert "go on with: " in capsys.readouterr().err
    finished = sorted((home / "out").rglob("result.json"))
    assert len(finished) == 1
    assert "unfinished" in (home / "out" / "report.md").read_text()
    before = finished[0].stat().st_mtime_ns
    assert run(home, "out") == 0
    assert finished[0].stat().st_mtime_ns == before
    assert "resumed" in (home / "out" / "compare.log").read_text()
    assert losses(home / "out") == losses(home / "whole")
    assert len(losses(home / "out")) == 4


@pytest.mark.nightly
def test_a_cell_whose_process_dies_does_not_stop_the_others(home: Path) -> None:
    grid = [
        {
            "name": "main",
            "data": {"name": "fashion-mini"},
            "axes": {"model": [f"{__name__}:dying", "mlp"]},
        }
    ]
    assert run(home, "out", workers=2, sections=grid, rules=["bp"], seeds=[0], epochs=1) == 1
    text = (home / "out" / "report.md").read_text()
    assert "failed (its process died (exit code 9" in text
    assert "1 done, 1 failed" in text


@pytest.mark.parametrize(("task", "what"), [("classification", "images"), ("music", "to train on")])
def test_a_head_calls_examples_what_they_are(task: str, what: str) -> None:
    run = {
        "data": {"train": 1200},
        "config": {"task": task},
        "column": "some",
        "seeds": [0],
        "epochs": 2,
    }
    assert head(run) == f"some (1,200 {what}, 2 epochs, 1 seed)"
