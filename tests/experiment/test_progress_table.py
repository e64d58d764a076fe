"""The table that fills in while a study runs, and what stands for it where there is no terminal."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_grid import TINY, changed

from feedbackward.experiment.config.schema import TrainConfig
from feedbackward.experiment.grid.cells import Job, Outcome
from feedbackward.experiment.grid.plan import Options, expand
from feedbackward.experiment.grid.progress_table import HEARTBEAT, Key, ProgressTable

FOLDER, NO_DATA = "main/fashion-mini", "main/cifar100"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def progress(out: Path, terminal: bool) -> tuple[ProgressTable, io.StringIO, Clock]:
    """Two rules, two seeds, two data sets of which one is missing."""
    shown, clock = io.StringIO(), Clock()
    console = Console(
        file=shown, force_terminal=terminal, width=100, color_system=None, legacy_windows=False
    )
    made = ProgressTable(
        expand(changed(), Options(str(out))), console, 1, {NO_DATA: "not here"}, clock
    )
    for label in ("BP", "Frozen"):
        for seed in TINY["seeds"]:
            job = Job(
                f"mlp, {label}, seed {seed}",
                TrainConfig(),
                ("mlp", "mini", FOLDER),
                label,
                images=200,
            )
            made.add((FOLDER, label, seed), job, None)
    return made, shown, clock


def done(accuracy: float, seconds: float = 10.0) -> Outcome:
    return Outcome("done", result={"seconds": seconds, "test_accuracy": accuracy})


def rows(made: ProgressTable) -> dict[str, list[str]]:
    """The cells of the table by rule, as they are shown."""
    out = io.StringIO()
    Console(file=out, width=100, color_system=None).print(made.view())
    lines = [line.split() for line in out.getvalue().splitlines()]
    return {
        label: line[line.index(label) + 1 :]
        for line in lines
        for label in ("BP", "Frozen")
        if label in line and "seed" not in line
    }


def tell(made: ProgressTable, label: str, seed: int, *events: tuple[str, Any]) -> None:
    key: Key = (FOLDER, label, seed)
    for kind, value in events:
        made.report(key, kind, value)


def test_the_table_fills_in(tmp_path: Path) -> None:
    made, _, clock = progress(tmp_path, terminal=True)
    assert rows(made) == {"BP": ["·", "no", "data"], "Frozen": ["·", "no", "data"]}
    assert made.count() == "0 of 4 cells"
    tell(made, "BP", 0, ("start", None), ("begin", (20, 0)), ("step", (5, "epoch 1/2")))
    assert rows(made)["BP"][0] == "25"  # per cent
    clock.now = 10.0
    tell(made, "BP", 0, ("end", done(80.0)))
    assert rows(made)["BP"][:2] == ["80.0", "1/2"]
    tell(made, "BP", 1, ("start", None), ("begin", (20, 0)), ("end", done(90.0)))
    assert rows(made)["BP"][0] == "85.0"
    tell(
        made, "Frozen", 0, ("start", None), ("begin", (20, 0)), ("end", Outcome("diverged", "NaN"))
    )
    assert rows(made)["Frozen"][0] == "diverged"


def test_the_time_left_is_that_of_what_was_measured(tmp_path: Path) -> None:
    """Two cells of 10 seconds are done, two like them are not, one of which is half done: 15 seconds."""
    made, _, clock = progress(tmp_path, terminal=False)
    for seed in (0, 1):
        tell(made, "BP", seed, ("start", None), ("begin", (20, 0)), ("end", done(80.0, 10.0)))
    tell(made, "Frozen", 0, ("start", None), ("begin", (20, 0)))
    clock.now = 5.0
    tell(made, "Frozen", 0, ("step", (10, "")))
    assert made.eta() == pytest.approx(15.0)
    assert made.count() == "2 of 4 cells, about 15 s left"


def test_in_a_terminal_it_is_one_live_table(tmp_path: Path) -> None:
    made, shown, clock = progress(tmp_path, terminal=True)
    with made:
        tell(
            made, "BP", 0, ("start", None), ("begin", (20, 0)), ("step", (5, "epoch 1/2, loss 0.5"))
        )
        clock.now = 10 * HEARTBEAT
        made.report(None, "idle", None)
        tell(made, "BP", 0, ("end", done(81.5)))
    text = shown.getvalue()
    assert "81.5 1/2" in text
    assert "mlp, BP, seed 0: done in 10 s, test 81.5 %" in text
    assert "running:" not in text  # the table says it
    assert "\x1b[" in text  # drawn over itself


def test_elsewhere_there_are_lines_and_signs_of_life(tmp_path: Path) -> None:
    made, shown, clock = progress(tmp_path, terminal=False)
    with made:
        tell(
            made, "BP", 0, ("start", None), ("begin", (20, 0)), ("step", (5, "epoch 1/2, loss 0.5"))
        )
        assert shown.getvalue() == ""
        clock.now = HEARTBEAT + 1
        made.report(None, "idle", None)
        made.report(None, "idle", None)
        tell(made, "BP", 0, ("end", done(81.5, 150.0)))
    beat, end = shown.getvalue().splitlines()
    assert "running: mlp, BP, seed 0 (epoch 1/2, loss 0.5)" in beat
    assert "mlp, BP, seed 0: done in 2 min, test 81.5 %" in end
    assert "\x1b" not in shown.getvalue()
    assert [line.split(" ", 2)[2] for line in made.log.read_text().splitlines()] == [beat, end]
