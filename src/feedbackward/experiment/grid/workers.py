"""Running cells: one after another in this process, or several at once in processes of their own."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from feedbackward.experiment.grid.cells import Job, Outcome, keep, run_cell
from feedbackward.experiment.training.building import find_device
from feedbackward.experiment.training.environment import environment
from feedbackward.experiment.training.interrupts import InterruptedRunError, Interrupts

Told = Callable[
    [int, str, Any], None
]  # number of the job, kind of event, its value; "end" comes with an Outcome
CELL_BYTES = 2_000_000_000  # of memory that a cell is taken to need, data set and all
POLL = 0.2  # seconds between two looks at the workers


def sensible_workers(device: str) -> int:
    """One process per core as far as memory goes; one where there is a GPU."""
    if find_device(device).type == "cuda":
        return 1
    known = environment(torch.device("cpu"))
    return max(1, min(known["cores"] or 1, (known["memory_bytes"] or CELL_BYTES) // CELL_BYTES))


def run_jobs(jobs: Sequence[Job], workers: int, told: Told, interrupts: Interrupts) -> None:
    """Run every job; `told` hears of the progress and the end of each, in this process.

    Raises:
        InterruptedRunError: a signal came; the running cells are saved.
    """
    if workers > 1 and len(jobs) > 1:
        _Pool(min(workers, len(jobs)), told, interrupts).run(jobs)
        return
    for number, job in enumerate(jobs):
        interrupts.check()
        told(number, "start", None)
        outcome = run_cell(job, partial(told, number), interrupts)
        told(number, "end", outcome)
        if outcome.status == "stopped":
            interrupts.check()
            raise InterruptedRunError(signal.SIGINT)


class _Pool:
    """Processes that run a job at a time each. One that dies fails its cell, and another takes its place."""

    def __init__(self, count: int, told: Told, interrupts: Interrupts) -> None:
        self.count, self.told, self.interrupts = count, told, interrupts
        self.processes: dict[Connection, BaseProcess] = {}
        self.running: dict[Connection, int] = {}
        self.jobs: Sequence[Job] = ()
        self.stopping = False

    def run(self, jobs: Sequence[Job]) -> None:
        self.jobs, waiting = jobs, deque(range(len(jobs)))
        try:
            while waiting or self.running:
                self.interrupts.check()
                while waiting and len(self.running) < self.count:
                    self._give(waiting.popleft())
                self._listen()
                self.told(-1, "tick", None)
        except InterruptedRunError:
            self._stop()
            raise
        finally:
            self._end()

    def _give(self, number: int) -> None:
        idle = [pipe for pipe in self.processes if pipe not in self.running]
        pipe = idle[0] if idle else self._start()
        self.running[pipe] = number
        self.told(number, "start", None)
        with contextlib.suppress(OSError):  # it has died: `_listen` finds out
            pipe.send(self.jobs[number])

    def _start(self) -> Connection:
        context = multiprocessing.get_context(
            "spawn"
        )  # a forked copy of PyTorch's threads may hang
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(there,), daemon=True)
        with _deaf():
            process.start()
        there.close()
        self.processes[here] = process
        return here

    def _listen(self) -> None:
        """Pass on what the workers have to say, and notice those that died."""
        for pipe in wait(list(self.processes), timeout=POLL):
            assert isinstance(pipe, Connection)
            try:
                kind, value = pipe.recv()
            except (EOFError, OSError):
                self._bury(pipe)
                continue
            number = self.running.pop(pipe) if kind == "end" else self.running[pipe]
            self.told(number, kind, value)

    def _bury(self, pipe: Connection) -> None:
        process = self.processes.pop(pipe)
        pipe.close()
        process.join(5)
        if pipe in self.running:
            why = f"its process died (exit code {process.exitcode}; -9 often means too little memory: use fewer --workers)"
            number = self.running.pop(pipe)
            outcome = Outcome("stopped") if self.stopping else Outcome("failed", why)
            if not self.stopping:  # before it could note the signal, else
                keep(self.jobs[number], outcome)
            self.told(number, "end", outcome)

    def _stop(self) -> None:
        """Let every running cell save itself."""
        self.stopping = True
        for pipe in self.running:
            self.processes[pipe].terminate()  # SIGTERM, which the worker notes
        while self.running:
            self._listen()

    def _end(self) -> None:
        for pipe, process in self.processes.items():
            pipe.close()  # the worker reads the end of its input, and ends
            process.join(0.1 if self.running else 5)
            if process.is_alive():
                process.kill()


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Processes that are started within do not hear Ctrl-C, from their first moment on: the main process tells them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _Told(Interrupts):
    """A worker's: it stops when the main process says so, for Ctrl-C reaches both."""

    def __enter__(self) -> _Told:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._noted)
        return self

    def _noted(self, signum: int, frame: Any) -> None:
        self._signum = signum


def _work(pipe: Connection) -> None:
    """The life of a worker process: jobs in, events out, one thread."""
    torch.set_num_threads(1)
    with _Told() as interrupts:
        for job in _jobs(pipe):
            with warnings.catch_warnings():
                warnings.showwarning = lambda text, *where: pipe.send(
                    ("warning", " ".join(str(text).split()))
                )
                outcome = run_cell(job, lambda kind, value: pipe.send((kind, value)), interrupts)
            pipe.send(("end", outcome))
            if outcome.status == "stopped":  # by a signal that was meant for this process
                return


def _jobs(pipe: Connection) -> Iterator[Job]:
    """Jobs until the main process closes the pipe, or has gone."""
    while True:
        try:
            job = pipe.recv()
        except (EOFError, OSError):
            return
        yield job
