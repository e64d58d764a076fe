"""Running cells: one after another in this process, or several at once in processes of their own."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from feedbackward.experiment.grid.cells import Job, Outcome, keep_reason, warnings_sent
from feedbackward.experiment.grid.divided import POLL, run_job
from feedbackward.experiment.grid.plan import Plan
from feedbackward.experiment.training.building import find_device
from feedbackward.experiment.training.environment import environment
from feedbackward.experiment.training.interrupts import InterruptedRunError, Interrupts

# number of the job, kind of event, its value; "end" comes with an Outcome
Report = Callable[[int, str, Any], None]
CELL_BYTES = 2_000_000_000  # of memory that a cell is taken to need, data set and all


def default_workers(plan: Plan) -> int:
    """One process per core as far as memory goes, for cells that take several; one where there is a GPU; what a cluster has."""
    if plan.options.executor == "ray":
        from feedbackward.experiment.grid.ray_workers import cluster_workers

        return cluster_workers(plan)
    if find_device(plan.device).type == "cuda":
        return 1
    known = environment(torch.device("cpu"))
    most = min(known["cores"] or 1, (known["memory_bytes"] or CELL_BYTES) // CELL_BYTES)
    return max(1, most // plan.processes)


def run_jobs(
    jobs: Sequence[Job],
    workers: int,
    report: Report,
    interrupts: Interrupts,
    executor: str = "local",
) -> None:
    """Run every job; `report` receives the progress and the end of each, in this process, and may add jobs at an end.

    Raises:
        InterruptedRunError: a signal came; the running cells are saved.
    """
    if executor == "ray":
        from feedbackward.experiment.grid.ray_workers import RayTasks

        RayTasks(workers, report, interrupts).run(jobs)
        return
    if workers > 1 and len(jobs) > 1:
        _Processes(workers, report, interrupts).run(jobs)
        return
    for number, job in enumerate(jobs):
        interrupts.check()
        report(number, "start", None)
        outcome = run_job(job, partial(report, number), interrupts)
        report(number, "end", outcome)
        if outcome.status == "stopped":
            interrupts.check()
            raise InterruptedRunError(signal.SIGINT)


class Pool(ABC):
    """Runs jobs side by side, at most `count` at once. `running`: what runs a job now, and the job's number."""

    def __init__(self, count: int, report: Report, interrupts: Interrupts) -> None:
        self.count, self.report, self.interrupts = count, report, interrupts
        self.running: dict[Any, int] = {}
        self.jobs: Sequence[Job] = ()
        self.stopping = False

    def run(self, jobs: Sequence[Job]) -> None:
        """Run all. Raises InterruptedRunError for a signal, once the running jobs are saved."""
        self.jobs, given = jobs, 0
        try:
            while given < len(jobs) or self.running:
                self.interrupts.check()
                while given < len(jobs) and len(self.running) < self.count:
                    self._give(given)
                    given += 1
                self._listen()
                self.report(-1, "tick", None)
        except InterruptedRunError:
            self.stopping = True
            self._stop()
            while self.running:
                self._listen()
            raise
        finally:
            self._end()

    @abstractmethod
    def _give(self, number: int) -> None:
        """Start a job."""

    @abstractmethod
    def _listen(self) -> None:
        """Wait for a moment; report what happened, and the end of jobs."""

    @abstractmethod
    def _stop(self) -> None:
        """Ask every running job to save itself and end."""

    @abstractmethod
    def _end(self) -> None:
        """Let go of everything, at once if jobs still run."""


class _Processes(Pool):
    """Processes that run a job at a time each. One that dies fails its cell, and another takes its place."""

    def __init__(self, count: int, report: Report, interrupts: Interrupts) -> None:
        super().__init__(count, report, interrupts)
        self.processes: dict[Connection, BaseProcess] = {}

    def _give(self, number: int) -> None:
        idle = [pipe for pipe in self.processes if pipe not in self.running]
        pipe = idle[0] if idle else self._start()
        self.running[pipe] = number
        self.report(number, "start", None)
        with contextlib.suppress(OSError):  # it has died: `_listen` finds out
            pipe.send(self.jobs[number])

    def _start(self) -> Connection:
        # a forked copy of PyTorch's threads may hang
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(there,), daemon=True)
        with _sigint_ignored():
            process.start()
        there.close()
        self.processes[here] = process
        return here

    def _listen(self) -> None:
        for pipe in wait(list(self.processes), timeout=POLL):
            assert isinstance(pipe, Connection)
            try:
                kind, value = pipe.recv()
            except (EOFError, OSError):
                self._replace(pipe)
                continue
            number = self.running.pop(pipe) if kind == "end" else self.running[pipe]
            self.report(number, kind, value)

    def _replace(self, pipe: Connection) -> None:
        process = self.processes.pop(pipe)
        pipe.close()
        process.join(5)
        if pipe in self.running:
            why = f"its process died (exit code {process.exitcode}; -9 often means too little memory: use fewer --workers)"
            number = self.running.pop(pipe)
            outcome = Outcome("stopped") if self.stopping else Outcome("failed", why)
            if not self.stopping:  # before it could note the signal, else
                keep_reason(self.jobs[number], outcome)
            self.report(number, "end", outcome)

    def _stop(self) -> None:
        for pipe in self.running:
            self.processes[pipe].terminate()  # SIGTERM, which the worker notes

    def _end(self) -> None:
        for pipe, process in self.processes.items():
            pipe.close()  # the worker reads the end of its input, and ends
            process.join(0.1 if self.running else 5)
            if process.is_alive():
                process.kill()


@contextlib.contextmanager
def _sigint_ignored() -> Iterator[None]:
    """Processes that are started within ignore Ctrl-C from their first moment on.

    The terminal sends it to every process; the main process decides and sends SIGTERM.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _WorkerInterrupts(Interrupts):
    """Of a worker: it stops on the main process's SIGTERM only."""

    def __enter__(self) -> _WorkerInterrupts:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._note)
        return self


def _work(pipe: Connection) -> None:
    """The loop of a worker process: it receives jobs and sends events, on one thread."""
    torch.set_num_threads(1)

    def send(kind: str, value: Any) -> None:
        pipe.send((kind, value))

    with _WorkerInterrupts() as interrupts:
        for job in _jobs(pipe):
            with warnings_sent(send):
                outcome = run_job(job, send, interrupts)
            send("end", outcome)
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
