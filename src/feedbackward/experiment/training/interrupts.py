"""Ctrl-C and termination: finish the step, then stop."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any


class InterruptedRunError(Exception):
    """A run was asked to stop, and stopped between two steps.

    Attributes:
        signum: the signal; the exit code is 128 + signum, as in a shell.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Interrupts:
    """While entered, SIGINT and SIGTERM are noted, and `check` raises; a second SIGINT stops at once.

    Only the main thread of a process can catch signals; elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self._signum: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread() and not self._before:
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before.clear()

    @property
    def signum(self) -> int:
        """The signal that came, 0 for none."""
        return self._signum or 0

    def check(self) -> None:
        """Raise InterruptedRunError if a signal came."""
        if self._signum is not None:
            raise InterruptedRunError(self._signum)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._signum is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self._signum = signum
        if (
            sys.stderr.isatty()
        ):  # by the bare system call: a handler must not wait for a lock that it interrupted
            os.write(
                sys.stderr.fileno(), b"\nstopping after this step; Ctrl-C again stops at once\n"
            )
