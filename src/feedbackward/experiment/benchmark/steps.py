"""Measures training steps of several kinds in one process: memory one kind at a time, time interleaved."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from feedbackward.errors import ConfigError, FeedbackError
from feedbackward.experiment.training.measure import WARM_UP, activation_bytes, rounds
from feedbackward.experiment.training.progress import Progress


@dataclass
class TrainingStep:
    """A network that `step` trains on one batch: zero gradients, forward, loss, backward, update of all weights.

    `holder` has all weights and buffers, of the feedback too; `batch` are the other tensors that a step is given. `kept`:
    tensors that live between steps besides. `feedback_bytes` are those of the feedback weights. `seen`: whether all of the
    step's tensors can be seen from Python; those of compiled code cannot. `note`: what was chosen when it was made.
    """

    step: Callable[[], Any]
    holder: nn.Module
    optimizer: torch.optim.Optimizer
    batch: Sequence[Tensor]
    feedback_bytes: int = 0
    kept: Sequence[Tensor] = ()
    seen: bool = True
    note: str = ""

    def held(self) -> Iterator[Tensor]:
        """Everything that stays alive between steps, gradients apart."""
        yield from (*self.holder.parameters(), *self.holder.buffers(), *self.batch, *self.kept)
        for state in self.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))

    def activation_bytes(self, device: torch.device) -> int | None:
        """See `measure.activation_bytes`; None where it cannot be told."""
        if not self.seen and device.type != "cuda":
            return None
        return activation_bytes(
            self.step, list(self.held()), list(self.holder.parameters()), device
        )


@dataclass(frozen=True)
class Case:
    """One kind of step: how it is called, and how it is made. `build` may raise FeedbackError: a case is then refused."""

    rule: str
    schedule: str
    operator: str
    build: Callable[[], TrainingStep]

    @property
    def label(self) -> str:
        """All that tells it from the others, on one line."""
        parts = [self.rule, self.schedule, self.operator]
        return ", ".join(part for part in parts if part not in ("", "-"))


@dataclass
class Row:
    """What was measured of a case: milliseconds per round, and bytes; or why it was refused."""

    case: Case
    refused: str | None = None
    note: str = ""
    activation_bytes: int | None = None
    feedback_bytes: int | None = None
    milliseconds: list[float] = field(default_factory=list)


@dataclass
class Bench:
    """The rows of a bench; the first case is the baseline. They are filled as it goes, so that a stop loses nothing.

    `check` is called before every step, and may raise.
    """

    cases: Sequence[Case]
    device: torch.device
    progress: Progress
    check: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.rows = [Row(case) for case in self.cases]
        labels = [case.label for case in self.cases]
        for label in labels:
            if labels.count(label) > 1:
                raise ConfigError(
                    f"two configurations are called '{label}': leave one out, or give it a label"
                )

    def measure(self, count: int, clock: Callable[[], float] = time.perf_counter) -> None:
        """Memory of every case, then `count` rounds of all that were not refused."""
        self._measure_memory()
        self._measure_time(count, clock)

    def _measure_memory(self) -> None:
        self.progress.begin_run(len(self.rows), 0)
        try:
            for number, row in enumerate(self.rows, start=1):
                self._measure_memory_of(row)
                size = row.activation_bytes
                found = (
                    "refused"
                    if row.refused
                    else "not seen"
                    if size is None
                    else f"{size / 1e6:.1f} MB"
                )
                self.progress.step("memory", row.case.label)
                self._say(f"memory {number}/{len(self.rows)}: {row.case.label}: {found}")
        finally:
            self.progress.end_run()

    def _measure_memory_of(self, row: Row) -> None:
        try:
            made = row.case.build()
            for _ in range(WARM_UP):
                self.check()
                made.step()
            row.feedback_bytes, row.note = made.feedback_bytes, made.note
            self.check()
            row.activation_bytes = made.activation_bytes(self.device)
        except ConfigError:
            raise
        except FeedbackError as error:
            row.refused = " ".join(str(error).split())
        except torch.OutOfMemoryError:
            row.refused = "does not fit into the device's memory"
        finally:
            made = None  # type: ignore[assignment]
            gc.collect()

    def _measure_time(self, count: int, clock: Callable[[], float]) -> None:
        timed = [row for row in self.rows if not row.refused]
        self.progress.begin_run(count, 0)
        try:
            steps = [self._checked(row.case.build().step) for row in timed]
            for number, spent in enumerate(rounds(steps, count, self.device, clock), start=1):
                for row, milliseconds in zip(timed, spent, strict=True):
                    row.milliseconds.append(milliseconds)
                self.progress.step("round", "")
                so_far = sum(sum(row.milliseconds) for row in timed) / 1000
                left = math.ceil(so_far / number * (count - number))
                self._say(f"round {number}/{count}, {left // 60}:{left % 60:02} left")
        finally:
            self.progress.end_run()

    def _checked(self, step: Callable[[], Any]) -> Callable[[], None]:
        def checked() -> None:
            self.check()
            step()

        return checked

    def _say(self, text: str) -> None:
        """A line, if no progress bar shows it."""
        if not self.progress.console.is_terminal:
            self.progress.say(text)


def summary(rows: Sequence[Row], batch: int) -> list[dict[str, Any]]:
    """The rows ready for JSON, each relative to the first. Ratios of time are taken within a round, so that a slow moment of
    the machine cancels out."""
    first = rows[0]
    return [
        {
            "rule": row.case.rule,
            "schedule": row.case.schedule,
            "operator": row.case.operator,
            "note": row.note,
            "refused": row.refused,
            "rounds": len(row.milliseconds),
            "ms": spread(row.milliseconds),
            "time_ratio": spread(
                [a / b for a, b in zip(row.milliseconds, first.milliseconds, strict=False)]
            ),
            "images_per_second": 1000 * batch / statistics.median(row.milliseconds)
            if row.milliseconds
            else None,
            "activation_bytes": row.activation_bytes,
            "activation_ratio": _ratio(row.activation_bytes, first.activation_bytes),
            "feedback_bytes": row.feedback_bytes,
            "all_ms": [round(value, 4) for value in row.milliseconds],
        }
        for row in rows
    ]


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Median, least and most; None of nothing."""
    if not values:
        return None
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _ratio(value: int | None, base: int | None) -> float | None:
    return value / base if value is not None and base else None
