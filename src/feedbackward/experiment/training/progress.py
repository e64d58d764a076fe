"""The progress of one run: a live bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars


class Progress:
    """What a run and a measurement report to.

    In a terminal a bar shows the running epoch, images per second, the loss and the time left.
    Elsewhere there is one line per finished thing.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._bars: Bars | None = None
        self._run: TaskID | None = None

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
        self._bars = self._run = None

    def say(self, text: str) -> None:
        """One line, above the bar."""
        self.console.print(escape(text), soft_wrap=True, highlight=False)

    def begin_run(self, steps: int, done: int) -> None:
        """A run of so many steps in all starts, or continues where it was."""
        if self._bars:
            self._run = self._bars.add_task("", total=steps, completed=done, note="")

    def step(self, label: str, note: str) -> None:
        """One more step of the running run is done."""
        if self._bars and self._run is not None:
            self._bars.update(self._run, advance=1, description=escape(label), note=escape(note))

    def enough(self) -> str | None:
        """Asked before every epoch: why the run should end without it; None where it should go on."""
        return None

    def end_run(self) -> None:
        """The run is over, one way or another."""
        if self._bars and self._run is not None:
            self._bars.remove_task(self._run)
        self._run = None
