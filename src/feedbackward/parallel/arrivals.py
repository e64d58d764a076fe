"""Which messages have arrived. Gloo does not say it of a receive until somebody waits for it, so a thread waits."""

from __future__ import annotations

import threading
import weakref
from datetime import timedelta
from queue import SimpleQueue

import torch.distributed as dist


class Awaited:
    """A receive that the thread waits for."""

    def __init__(self, work: dist.Work) -> None:
        self._work: dist.Work | None = work
        self._ended = threading.Event()
        self._error: RuntimeError | None = None

    @property
    def arrived(self) -> bool:
        return self._ended.is_set()

    def wait(self, timeout: timedelta) -> None:
        """Until the thread has ended its own wait, which has the timeout; raises what that raised."""
        self._ended.wait()
        if self._error is not None:
            raise self._error

    def end(self, timeout: timedelta) -> None:
        """In the thread: wait. Nothing of the receive is kept: freed while Python ends, it would abort the process."""
        assert self._work is not None
        try:
            self._work.wait(timeout)
        except RuntimeError as error:
            self._error = error
        finally:
            self._work = None
            self._ended.set()


class Arrivals:
    """A thread that waits for messages in the order in which they were posted."""

    def __init__(self, timeout: timedelta) -> None:
        self._timeout, self._queue = timeout, SimpleQueue[Awaited | None]()
        self._thread: threading.Thread | None = None

    def notice(self, work: dist.Work) -> Awaited:
        """Wait for this one too."""
        if self._thread is None:
            arguments = self._queue, self._timeout
            self._thread = threading.Thread(target=_wait_for_all, args=arguments, daemon=True)
            self._thread.start()
            # the thread ends with the object, or before Python does
            weakref.finalize(self, _stop, self._queue, self._thread)
        awaited = Awaited(work)
        self._queue.put(awaited)
        return awaited


def _stop(queue: SimpleQueue[Awaited | None], thread: threading.Thread) -> None:
    queue.put(None)
    # it may still wait for a message that will never come
    thread.join(1.0)


def _wait_for_all(queue: SimpleQueue[Awaited | None], timeout: timedelta) -> None:
    while (awaited := queue.get()) is not None:
        awaited.end(timeout)
        del awaited
