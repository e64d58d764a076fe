"""One cell of a study: a training run whose end, whatever it is, is told instead of raised."""

from __future__ import annotations

import contextlib
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feedbackward.errors import CheckpointError, DivergenceError, FeedbackError
from feedbackward.experiment.config.schema import TrainConfig
from feedbackward.experiment.training.interrupts import InterruptedRunError, Interrupts
from feedbackward.experiment.training.progress import Progress
from feedbackward.experiment.training.runfolder import RunFolder
from feedbackward.experiment.training.train import train

Send = Callable[[str, Any], None]
INTERVAL = 0.5  # seconds between two reports of the same cell
STATES = ("done", "diverged", "refused", "failed", "stopped")  # how a cell can end


@dataclass(frozen=True)
class Job:
    """A cell to run: a trial of rates unless `test`.

    Attributes:
        title: for people.
        group: model, data set and the rest of the point; cells of a group cost alike.
        label: of the rule.
        images: training images that the whole run sees, epoch after epoch.
    """

    title: str
    config: TrainConfig
    group: tuple[str, ...]
    label: str
    images: int
    test: bool = True

    @property
    def folder(self) -> RunFolder:
        """Where it lives."""
        return RunFolder(Path(self.config.out or ""))


@dataclass(frozen=True)
class Outcome:
    """How a cell ended: one of STATES, why, and what result.json says where it is done."""

    status: str
    message: str = ""
    result: dict[str, Any] | None = None


class Relay(Progress):
    """Passes on what a run tells: ("begin", (steps, done)), ("step", (done, note)), ("say", text)."""

    def __init__(self, send: Send) -> None:
        super().__init__()
        self._send = send
        self._done, self._last = 0, 0.0

    def say(self, text: str) -> None:
        self._send("say", text)

    def begin_run(self, steps: int, done: int) -> None:
        self._done = done
        self._send("begin", (steps, done))

    def step(self, label: str, note: str) -> None:
        self._done += 1
        now = time.monotonic()
        if now - self._last >= INTERVAL:
            self._last = now
            self._send("step", (self._done, f"{label}, {note}"))

    def end_run(self) -> None:
        pass


def run_cell(job: Job, send: Send, interrupts: Interrupts) -> Outcome:
    """Train a cell, or go on with it, and say how it ended; only a bug of the machine itself is raised.

    Why a cell was refused or failed is kept in its folder, for tables that are made later.
    """
    _note(job).unlink(missing_ok=True)
    try:
        result = train(job.config, Relay(send), interrupts, test=job.test)
        return Outcome("done", "", result)
    except InterruptedRunError:
        return Outcome("stopped")
    except DivergenceError as error:
        return Outcome("diverged", str(error))
    except FeedbackError as error:
        outcome = Outcome(
            "failed" if isinstance(error, CheckpointError) else "refused",
            " ".join(str(error).split()),
        )
    except (
        Exception
    ) as error:  # one cell's fault, of whatever kind, must not cost the night's other cells
        send("say", traceback.format_exc())
        outcome = Outcome("failed", f"{type(error).__name__}: {' '.join(str(error).split())}")
    keep(job, outcome)
    return outcome


def keep(job: Job, outcome: Outcome) -> None:
    """Note in the cell's folder why it has no result, as far as there is a folder."""
    with contextlib.suppress(FeedbackError, OSError):
        if job.folder.path.is_dir():
            job.folder.write_json(
                _note(job), {"status": outcome.status, "message": outcome.message}
            )


def found(job: Job) -> Outcome | None:
    """How the cell ended when it was last run; None where it was not run to an end."""
    result = job.folder.result()
    if result is not None:
        return Outcome(result["status"], result["message"], result)
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        kept = json.loads(_note(job).read_text(encoding="utf-8"))
        return Outcome(str(kept["status"]), str(kept["message"]))
    return None


def _note(job: Job) -> Path:
    return job.folder.path / "refused.json"
