"""One cell of a grid: a training run whose end is reported, whatever it is, and not raised."""

from __future__ import annotations

import contextlib
import json
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feedbackward.errors import CheckpointError, DivergenceError, FeedbackError
from feedbackward.experiment.config.schema import TrainConfig
from feedbackward.experiment.config.tasks import KINDS
from feedbackward.experiment.training.interrupts import InterruptedRunError, Interrupts
from feedbackward.experiment.training.progress import Progress
from feedbackward.experiment.training.runfolder import RunFolder
from feedbackward.experiment.training.train import train

if TYPE_CHECKING:
    from feedbackward.experiment.grid.optuna_search import Pruning

Send = Callable[[str, Any], None]
INTERVAL = 0.5  # seconds between two reports of the same cell
# how a cell can end; with the first ones it has a result
STATES = ("done", "diverged", "pruned", "refused", "failed", "stopped")
ENDED = STATES[:3]


@dataclass(frozen=True)
class Job:
    """A cell to run.

    Attributes:
        title: its name for people.
        group: model, data set and folder; cells of a group take about as long.
        label: the label of the rule.
        images: training images that the whole run sees, over all epochs.
        test: whether to use the test images at the end; a trial of rates must not.
        pruning: what ends the run early, of a trial that may be.
    """

    title: str
    config: TrainConfig
    group: tuple[str, ...]
    label: str
    images: int
    test: bool = True
    pruning: Pruning | None = None

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


class ForwardedProgress(Progress):
    """Sends on what a run reports: ("begin", (steps, done)), ("step", (done, note)), ("say", text)."""

    def __init__(self, send: Send, job: Job) -> None:
        super().__init__()
        self._send, self._job = send, job
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

    def enough(self) -> str | None:
        job = self._job
        return job.pruning.reason(job.config, job.folder.rows()) if job.pruning else None

    def end_run(self) -> None:
        pass


@contextlib.contextmanager
def warnings_sent(send: Send) -> Iterator[None]:
    """Warnings go to `send`, each on one line."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda text, *where: send("warning", " ".join(str(text).split()))
        yield


def run_cell(job: Job, send: Send, interrupts: Interrupts) -> Outcome:
    """Train a cell, or continue it, and report how it ended.

    The reason of a refusal or a failure is kept in the cell's folder, for tables that are made later.
    """
    _reason_file(job).unlink(missing_ok=True)
    try:
        beside = _finished_beside(job)
        result = train(job.config, ForwardedProgress(send, job), interrupts, job.test, beside)
        return Outcome(result["status"], result["message"], result)
    except InterruptedRunError:
        return Outcome("stopped")
    except DivergenceError as error:
        return Outcome("diverged", str(error))
    except FeedbackError as error:
        outcome = Outcome(
            "failed" if isinstance(error, CheckpointError) else "refused",
            " ".join(str(error).split()),
        )
    except Exception as error:  # an error in one cell must not stop the others
        send("say", traceback.format_exc())
        outcome = Outcome("failed", f"{type(error).__name__}: {' '.join(str(error).split())}")
    keep_reason(job, outcome)
    return outcome


def _finished_beside(job: Job) -> list[RunFolder]:
    """A finished run of this comparison on the same data, if there is one: a table must not mix two states of them."""
    for file in sorted(job.folder.path.parent.glob("*/data.json")):
        other = RunFolder(file.parent)
        if other.path == job.folder.path or other.result() is None:
            continue
        if other.config().data == job.config.data:
            return [other]  # it was compared with the ones before it
    return []


def keep_reason(job: Job, outcome: Outcome) -> None:
    """Note in the cell's folder why it has no result, as far as there is a folder."""
    with contextlib.suppress(FeedbackError, OSError):
        if job.folder.path.is_dir():
            job.folder.write_json(
                _reason_file(job), {"status": outcome.status, "message": outcome.message}
            )


def find_outcome(job: Job) -> Outcome | None:
    """How the cell ended when it was last run; None if it has not ended."""
    result = job.folder.result()
    if result is not None:
        return Outcome(result["status"], result["message"], result)
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        kept = json.loads(_reason_file(job).read_text(encoding="utf-8"))
        return Outcome(str(kept["status"]), str(kept["message"]))
    return None


def _reason_file(job: Job) -> Path:
    return job.folder.path / "refused.json"


def run_record(config: TrainConfig) -> dict[str, Any]:
    """A run as the results hold it: how it ended or how far it is, its epochs and its probes."""
    job = Job("", config, (), "", 0)
    end, rows = find_outcome(job), job.folder.rows()
    begun = "unfinished" if job.folder.checkpoint.exists() else "not run"
    result = (end.result if end else None) or {}
    status = end.status if end else begun
    epochs = [row for row in rows if row.get("kind") == "epoch"]
    return {
        "seed": config.seed,
        "status": status,
        "message": end.message if end else "",
        **KINDS[config.task].measure.record(
            result, epochs[-1] if status == "done" and epochs else {}
        ),
        "seconds": result.get("seconds"),
        "epochs": [{k: v for k, v in row.items() if k != "kind"} for row in epochs],
        "alignment": [
            {k: v for k, v in row.items() if k != "kind"} for row in rows if "sites" in row
        ],
    }
