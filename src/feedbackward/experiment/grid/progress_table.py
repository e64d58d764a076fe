"""The progress of a grid: in a terminal a table that fills in, elsewhere a line per finished cell."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table as Grid
from rich.text import Text

from feedbackward.experiment.config.tasks import KINDS
from feedbackward.experiment.grid.cells import ENDED, Job, Outcome
from feedbackward.experiment.grid.eta import CellTime, duration, seconds_left
from feedbackward.experiment.grid.layout import column_name, tables
from feedbackward.experiment.grid.plan import Plan

HEARTBEAT = 30.0  # seconds between two lines about running cells, where there is no terminal
Key = tuple[str, str, int]  # folder, label, seed


@dataclass
class State:
    """A cell: its job, and how far it is."""

    job: Job
    status: str = "waiting"
    steps: int = 0
    first: int = 0  # steps that were done when it began
    done: int = 0
    began: float = 0.0
    seconds: float = 0.0
    score: float | None = None
    note: str = ""

    def time(self, now: float) -> CellTime:
        """What the ETA needs to know of it."""
        job = self.job
        if self.status == "running" and self.steps:
            share, measured = self.done / self.steps, (self.done - self.first) / self.steps
            return CellTime(job.group, job.label, job.images, share, measured, now - self.began)
        if self.status in ("waiting", "running", "stopped"):
            return CellTime(job.group, job.label, job.images)
        measured = 1.0 if self.status == "done" and self.seconds else 0.0
        return CellTime(job.group, job.label, job.images, 1.0, measured, self.seconds)


class ProgressTable:
    """Receives the events of every cell and shows them. Entered while cells run."""

    def __init__(
        self,
        plan: Plan,
        console: Console,
        workers: int,
        missing: Mapping[str, str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`missing`: why there is no data, by the folder of a comparison."""
        self.plan, self.console, self.workers = plan, console, workers
        self.missing, self.clock = missing, clock
        self.log = Path(plan.options.out) / "compare.log"
        self.states: dict[Key, State] = {}
        self._warned: set[str] = set()
        self._live: Live | None = None
        self._last_line = clock()

    def add(self, key: Key, job: Job, outcome: Outcome | None) -> None:
        """A cell of this run of the grid; `outcome` if it had ended before."""
        state = self.states[key] = State(job)
        if outcome is not None and outcome.status in ENDED:
            self._end(state, outcome)

    def __enter__(self) -> ProgressTable:
        if self.console.is_terminal:
            self._live = Live(get_renderable=self.view, console=self.console, refresh_per_second=2)
            self._live.start()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()
        self._live = None

    def report(self, key: Key | None, kind: str, value: Any) -> None:
        """An event of a cell; see `workers.run_jobs`."""
        if key is None:
            self._heartbeat()
            return
        state = self.states[key]
        if kind == "start":
            state.status, state.began = "running", self.clock()
        elif kind == "begin":
            state.steps, state.first = value
            state.done, state.began = state.first, self.clock()
        elif kind == "step":
            state.done, state.note = value
            self._heartbeat()
        elif kind == "end":
            self._end(state, value)
            self._finished(state, value)
        elif kind == "say":
            self._write(f"{state.job.title}: {value}")
        elif kind == "warning" and value not in self._warned:
            self._warned.add(value)
            self._write(f"warning: {value}")

    def say(self, text: str) -> None:
        """A line for the reader and for the log."""
        self.console.print(escape(text), soft_wrap=True, highlight=False)
        self._write(text)

    def eta(self) -> float | None:
        """Seconds that the rest will take."""
        times = [state.time(self.clock()) for state in self.states.values()]
        return seconds_left(times, self.workers)

    def count(self) -> str:
        """`12 of 60 cells, about 41 min left`."""
        done = sum(
            state.status not in ("waiting", "running", "stopped") for state in self.states.values()
        )
        left = self.eta() if done < len(self.states) else None
        return f"{done} of {len(self.states)} cells" + (
            "" if left is None else f", about {duration(left)} left"
        )

    def _end(self, state: State, outcome: Outcome) -> None:
        state.status, state.note = outcome.status, outcome.message
        if outcome.result is not None:
            measure = KINDS[state.job.config.task].measure
            state.seconds, state.score = outcome.result["seconds"], measure.value(outcome.result)

    def _finished(self, state: State, outcome: Outcome) -> None:
        if outcome.status == "stopped":
            return
        words = {"done": f"done in {duration(state.seconds)}"}.get(
            outcome.status, f"{outcome.status}: {outcome.message}"
        )
        measure = KINDS[state.job.config.task].measure
        score = "" if state.score is None else f", test {measure.in_words(state.score)}"
        self.say(f"[{self.count()}] {state.job.title}: {words}{score}")
        self._last_line = self.clock()

    def _heartbeat(self) -> None:
        """Without a terminal: a line about the running cells now and then."""
        if self._live or self.clock() - self._last_line < HEARTBEAT:
            return
        self._last_line = self.clock()
        running = [state for state in self.states.values() if state.status == "running"]
        self.say(
            f"[{self.count()}] running: "
            + "; ".join(f"{s.job.title} ({s.note or 'starting'})" for s in running)
        )

    def _write(self, text: str) -> None:
        with self.log.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def view(self) -> RenderableType:
        """The table as it stands, the running cells and the time left."""
        parts: list[RenderableType] = []
        for section in self.plan.grid.sections:
            grid = self._grid(section.name)
            if grid.row_count:
                parts += [Text(section.title, style="bold"), grid] if section.title else [grid]
        running = [state for state in self.states.values() if state.status == "running"]
        parts += [
            Text(f"{s.job.title}: {s.note or 'starting'}", overflow="ellipsis", no_wrap=True)
            for s in running
        ]
        return Group(*parts, Text(self.count(), style="bold"))

    def _grid(self, section: str) -> Grid:
        view = Grid(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        shown = [table for table in tables(self.plan) if table.section == section]
        names = list(
            dict.fromkeys(
                column_name(self.plan, block) for table in shown for block in table.blocks
            )
        )
        for name in ("", "", *names):
            view.add_column(Text(name), justify="right" if name else "left")
        for table in shown:
            for number, label in enumerate(table.labels):
                by_name = {
                    column_name(self.plan, b): self._cell(b.folder, label, b.seeds)
                    for b in table.blocks
                }
                if any(by_name.values()):
                    view.add_row(
                        table.title if number == 0 else "",
                        label,
                        *(by_name.get(n, "") for n in names),
                    )
        return view

    def _cell(self, folder: str, label: str, seeds: tuple[int, ...]) -> str:
        """All seeds of a rule in a comparison; empty where it is not part of this run."""
        if folder in self.missing:
            return "no data"
        states = [
            self.states[key] for seed in seeds if (key := (folder, label, seed)) in self.states
        ]
        if not states:
            return ""
        running = [state for state in states if state.status == "running"]
        scores = [state.score for state in states if state.score is not None]
        counts = "" if len(scores) == len(states) else f" {len(scores)}/{len(states)}"
        if scores:
            digits = KINDS[states[0].job.config.task].measure.digits
            return f"{fmean(scores):.{digits}f}{counts}"
        if running:
            return f"{100 * running[0].done // max(1, running[0].steps)} %"
        ended = {state.status for state in states}
        return next(
            (status for status in ("diverged", "refused", "failed") if status in ended), "·"
        )
