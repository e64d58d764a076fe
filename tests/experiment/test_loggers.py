"""Experiment trackers get the numbers of metrics.jsonl; those of other packages are in tests/clients."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from test_train import StopAfter, config, run

from feedbackward.errors import ConfigError
from feedbackward.experiment.training.interrupts import InterruptedRunError
from feedbackward.experiment.training.loggers import Logger, Start
from feedbackward.experiment.training.record import logger_names
from feedbackward.experiment.training.runfolder import RunFolder

MADE: list[Kept] = []


class Kept(Logger):
    """A tracker of the user's own."""

    def __init__(self, start: Start) -> None:
        self.start, self.told, self.closed = start, [], False
        self.id = start.id or f"number {len(MADE)}"
        MADE.append(self)

    def log(self, values: Any, epoch: int) -> None:
        assert not self.closed
        self.told.append((epoch, dict(values)))

    def close(self) -> None:
        self.closed = True


def expected(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """What metrics.jsonl says, as a tracker is told it."""
    found = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        kind, epoch = row.pop("kind"), row.pop("epoch")
        if kind == "probe":
            row = {
                f"{group}/{name}/angle": measures["angle"]
                for group in ("sites", "parameters")
                for name, measures in row[group].items()
            }
        found.append((epoch, {name: value for name, value in row.items() if value is not None}))
    return found


def test_a_logger_of_the_users_own_is_told_all_also_when_resumed(tmp_path: Path) -> None:
    MADE.clear()
    settings = config(tmp_path, logger="test_loggers:Kept", epochs=2)
    with pytest.raises(InterruptedRunError):
        run(settings, StopAfter(8))
    run(config(tmp_path, logger="test_loggers:Kept", epochs=2, resume=True))
    first, second = MADE
    assert first.start.id is None
    assert first.start.epoch is None
    assert first.start.config["forward.lr"] == settings.resolved().forward.lr
    assert first.start.config["rule"] == "dkp"
    assert first.closed
    assert second.closed
    assert second.start.id == first.id == "number 0"
    assert second.start.epoch == first.told[-1][0]
    assert first.told + second.told == expected(tmp_path / "run")


def test_where_metrics_go_may_change_when_a_run_is_resumed(tmp_path: Path) -> None:
    MADE.clear()
    with pytest.raises(InterruptedRunError):
        run(config(tmp_path, epochs=1), StopAfter(2))
    run(config(tmp_path, epochs=1, logger="test_loggers:Kept", resume=True))
    assert len(MADE) == 1
    RunFolder(tmp_path / "run").clear()
    assert not (tmp_path / "run" / "trackers.json").exists()


def test_a_name_that_is_asked_twice_is_one_logger(tmp_path: Path) -> None:
    assert logger_names(config(tmp_path, tensorboard=True, logger="tensorboard")) == ["tensorboard"]
    assert logger_names(config(tmp_path, logger="wandb")) == ["wandb"]
    assert logger_names(config(tmp_path)) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wandbb", r"known are tensorboard, wandb, mlflow; or package\.module:Class"),
        ("mlflow", "pip install mlflow"),
        ("no_such_module:Kept", r"expected package\.module:name"),
        ("test_loggers:Nothing", r"expected package\.module:name"),
    ],
)
def test_a_logger_that_is_not_there_is_refused_before_the_data_are_read(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    train = "feedbackward.experiment.training.train"
    monkeypatch.setattr(f"{train}.shared_data", lambda *given: pytest.fail("the data were read"))
    with pytest.raises(ConfigError, match=message):
        run(config(tmp_path, logger=name))
