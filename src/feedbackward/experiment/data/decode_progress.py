"""Progress of decoding on the terminal, and silence elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet_unless_terminal() -> Iterator[None]:
    """Keep the download bars of `datasets` out of log files."""
    import datasets

    hide = not sys.stderr.isatty() and not datasets.are_progress_bars_disabled()
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            datasets.enable_progress_bars()


class Progress:
    """A bar on stderr, from the third second on and only on a terminal."""

    def __init__(self, what: str, total: int | None) -> None:
        self.what, self.total, self.done = what, total, 0
        self.start = time.monotonic()
        self.bar: Any = None

    def __enter__(self) -> "Progress":
        return self

    def advance(self, images: int) -> None:
        """Count `images` more as done."""
        self.done += images
        if self.bar is None and sys.stderr.isatty() and time.monotonic() - self.start > 2:
            self._show()
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done)

    def _show(self) -> None:
        from rich.console import Console
        from rich.progress import Progress as Bar

        self.bar = Bar(console=Console(stderr=True), transient=True)
        self.task = self.bar.add_task(self.what, total=self.total)
        self.bar.start()

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
