"""The thread that notices messages keeps nothing of them, and ends with the object."""

from __future__ import annotations

import gc
import threading
import weakref
from datetime import timedelta

import pytest

from feedbackward.parallel.arrivals import Arrivals

WAIT = timedelta(seconds=30)


class Work:
    """A receive that ends when it is told to."""

    def __init__(self, error: str = "") -> None:
        self.here, self.error = threading.Event(), error

    def wait(self, timeout: timedelta) -> None:
        assert self.here.wait(timeout.total_seconds())
        if self.error:
            raise RuntimeError(self.error)


def test_a_message_is_noticed_and_not_kept() -> None:
    arrivals, work = Arrivals(WAIT), Work()
    awaited = arrivals.notice(work)  # type: ignore[arg-type]
    assert not awaited.arrived
    work.here.set()
    awaited.wait(WAIT)
    assert awaited.arrived
    gone = weakref.ref(work)
    del work
    gc.collect()
    assert gone() is None


def test_the_error_of_a_wait_is_raised_by_who_waits() -> None:
    work = Work("the link is cut")
    awaited = Arrivals(WAIT).notice(work)  # type: ignore[arg-type]
    work.here.set()
    with pytest.raises(RuntimeError, match="the link is cut"):
        awaited.wait(WAIT)


def test_the_thread_ends_with_the_object() -> None:
    arrivals, work = Arrivals(WAIT), Work()
    work.here.set()
    arrivals.notice(work).wait(WAIT)  # type: ignore[arg-type]
    thread = arrivals._thread
    assert thread is not None
    assert thread.is_alive()
    del arrivals
    gc.collect()
    assert not thread.is_alive()
