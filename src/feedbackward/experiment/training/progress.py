"""Telling how a run goes: a live bar in a terminal, plain lines elsewhere, and a log file."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars


class Progress:
    """What `train` and `compare` report to.

    In a terminal a bar shows the running epoch, images per second, the loss and the time left, and with
    several runs a second bar the whole. Elsewhere, and in ``log``, there is one line per finished thing.
    """

    def __init__(
        self, console: Console | None = None, runs: int = 1, log: Path | None = None
    ) -> None:
        self.console = console or Console()
        self.runs, self.log = runs, log
        self.prefix = ""  # of every line and of the bar: which run this is
        self._bars: Bars | None = None
        self._run: TaskID | None = None
        self._whole: TaskID | None = None
        self._steps_left = 0

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            columns = [
                TextColumn("{task.description}"),
                BarColumn(bar_width=12),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
            ]
            self._bars = Bars(
                *columns, console=self.console, transient=True, speed_estimate_period=60
            )
            self._bars.start()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars:
            self._bars.stop()
        self._bars = self._run = self._whole = None

    def say(self, text: str) -> None:
        """One line, above the bars and into the log."""
        self.console.print(escape(self.prefix + text), soft_wrap=True, highlight=False)
        if self.log:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self.prefix}{text}\n")

    def begin_run(self, steps: int, done: int) -> None:
        """A run of so many steps in all starts, or continues where it was."""
        self._steps_left = steps - done
        if not self._bars:
            return
        if self.runs > 1:
            if self._whole is None:
                self._whole = self._bars.add_task("all runs", total=steps * self.runs, note="")
            self._shorten(done)
        self._run = self._bars.add_task("", total=steps, completed=done, note="")

    def step(self, label: str, note: str) -> None:
        """One more step of the running run is done."""
        self._steps_left -= 1
        if self._bars and self._run is not None:
            text = escape(self.prefix + label)
            self._bars.update(self._run, advance=1, description=text, note=escape(note))
        if self._bars and self._whole is not None:
            self._bars.advance(self._whole)

    def end_run(self) -> None:
        """The run is over, one way or another."""
        self._shorten(self._steps_left)
        if self._bars and self._run is not None:
            self._bars.remove_task(self._run)
        self._run = None

    def _shorten(self, steps: int) -> None:
        """Take steps that will not be done off the whole: counting them as done would spoil the time left."""
        if self._bars and self._whole is not None and steps:
            total = self._bars.tasks[self._bars.task_ids.index(self._whole)].total or 0
            self._bars.update(self._whole, total=total - steps)
