"""Ctrl-C and termination: finish the step, then stop; where there is nothing to finish, stop at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any


class InterruptedRunError(BaseException):
    """A run was asked to stop, and stopped between two steps.

    It is no `Exception`: a signal may raise it within a library, whose handlers must not catch it.

    Attributes:
        signum: the signal; the exit code is 128 + signum, as in a shell.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Interrupts:
    """While entered, SIGINT and SIGTERM are noted, and `check` raises; a second SIGINT stops at once.

    Within `at_once()` the first signal raises where it comes.

    Only the main thread of a process can catch signals; elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self._signum: int | None = None
        self._before: dict[int, Any] = {}
        self._waits = True

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

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """A context whose work may be broken off anywhere (data that are decoded): a signal raises InterruptedRunError."""
        self._waits = False
        try:
            if self._signum is not None:
                raise InterruptedRunError(self._signum)
            yield
        finally:
            self._waits = True

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._signum is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self._signum = signum
        if not self._waits:
            # once: what this breaks off cleans up behind itself
            self._waits = True
            raise InterruptedRunError(signum)
        if (
            sys.stderr.isatty()
        ):  # by the bare system call: a handler must not wait for a lock that it interrupted
            os.write(
                sys.stderr.fileno(), b"\nstopping after this step; Ctrl-C again stops at once\n"
            )
