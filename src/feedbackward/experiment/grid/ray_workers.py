"""Cells as tasks of Ray: on this machine, or on a cluster whose nodes all see the folder of the results."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from feedbackward.errors import ConfigError
from feedbackward.experiment.config.schema import Settings
from feedbackward.experiment.grid.cells import Job, Outcome, keep_reason, warnings_sent
from feedbackward.experiment.grid.divided import POLL, run_job
from feedbackward.experiment.grid.plan import Plan
from feedbackward.experiment.grid.workers import Pool, Report
from feedbackward.experiment.training.interrupts import InterruptedRunError, Interrupts

SHARED = "give --out a folder that every node of the Ray cluster sees under the same path"


def connected() -> ModuleType:
    """Ray, connected: to RAY_ADDRESS or to a cluster that was started here, else to one that this process starts."""
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "--executor is ray, which is not installed: pip install 'feedbackward[ray]', or leave --executor out"
        ) from error
    if not ray.is_initialized():
        # Ray puts its own in the place of ours
        handler = signal.getsignal(signal.SIGTERM)
        ray.init(logging_level=logging.WARNING)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
    return ray


def cluster_workers(plan: Plan) -> int:
    """How many cells the cluster can run at once."""
    most = max(cpus(comparison.config) for comparison in plan.comparisons.values())
    return max(1, int(connected().cluster_resources().get("CPU", 1)) // most)


def cpus(config: Settings) -> int:
    """What a cell takes of a node."""
    return (config.threads or 1) * config.parallel.processes


class Board:
    """An actor between the cells and the process that shows them: their events, and whether they should stop."""

    def __init__(self) -> None:
        self.events: list[tuple[int, str, Any]] = []
        self.stopping = False

    def put(self, number: int, kind: str, value: Any) -> bool:
        """Add an event; returns whether to stop."""
        self.events.append((number, kind, value))
        return self.stopping

    def take(self, stop: bool) -> list[tuple[int, str, Any]]:
        """The events since the last call; with `stop`, the cells are told to."""
        self.stopping = stop
        events, self.events = self.events, []
        return events


class RayTasks(Pool):
    """A task for each cell. One whose worker or node dies fails alone."""

    def __init__(self, count: int, report: Report, interrupts: Interrupts) -> None:
        super().__init__(count, report, interrupts)
        self.ray = connected()
        self.board = self.ray.remote(num_cpus=0)(Board).remote()
        self.task = self.ray.remote(max_retries=0)(_run)
        self.started: set[int] = set()

    def _give(self, number: int) -> None:
        job = self.jobs[number]
        needed, nodes = cpus(job.config), [n for n in self.ray.nodes() if n["Alive"]]
        most = max(int(node["Resources"].get("CPU", 0)) for node in nodes)
        if needed > most:
            raise ConfigError(
                f"a cell takes {needed} CPUs, and no node of the Ray cluster has more than {most}: use fewer --threads or processes"
            )
        device = job.config.device
        gpus = int(device == "cuda" or (device == "auto" and torch.cuda.is_available()))
        task = self.task.options(num_cpus=needed, num_gpus=gpus)
        self.running[task.remote(job, number, self.board, os.getcwd())] = number

    def _listen(self) -> None:
        done, _ = self.ray.wait([*self.running], timeout=POLL)
        # a cell has told all before it ends
        for number, kind, value in self.ray.get(self.board.take.remote(self.stopping)):
            self.started |= {number} if kind == "start" else set()
            self.report(number, kind, value)
        for ref in done:
            number = self.running.pop(ref)
            self.report(number, "end", self._end_of(ref, self.jobs[number]))

    def _end_of(self, ref: Any, job: Job) -> Outcome:
        try:
            outcome: Outcome = self.ray.get(ref)
        except self.ray.exceptions.RayError as error:
            why = (
                f"its Ray task died ({type(error).__name__}): {' '.join(str(error).split())[:500]}"
            )
            outcome = Outcome("stopped") if self.stopping else Outcome("failed", why)
        else:
            if outcome.status != "done" or job.folder.result() is not None:
                return outcome
            outcome = Outcome("failed", f"its results are not in {job.folder.path}: {SHARED}")
        if outcome.status == "failed":
            keep_reason(job, outcome)
        return outcome

    def _stop(self) -> None:
        # the others hear of it by the board
        for ref, number in self.running.items():
            if number not in self.started:
                self.ray.cancel(ref)

    def _end(self) -> None:
        for ref in self.running:
            self.ray.cancel(ref, force=True)
        self.ray.kill(self.board)


class _Asked(Interrupts):
    """Of a cell: it stops when the board says so."""

    def __init__(self, asks: Callable[[], bool]) -> None:
        super().__init__()
        self._asks, self._next = asks, 0.0

    @property
    def signum(self) -> int:
        if not self._signum and time.monotonic() >= self._next:
            self._signum = signal.SIGTERM if self._asks() else None
            self._next = time.monotonic() + POLL
        return self._signum or 0

    def check(self) -> None:
        if signum := self.signum:
            raise InterruptedRunError(signum)


def _run(job: Job, number: int, board: Any, home: str) -> Outcome:
    """The task: a cell in the working folder of the process that asks for it."""
    import ray

    def tell(kind: str, value: Any = None) -> bool:
        return bool(ray.get(board.put.remote(number, kind, value)))

    def send(kind: str, value: Any) -> None:
        tell(kind, value)

    tell("start")
    if not Path(home).is_dir():
        return Outcome("failed", f"a node of the Ray cluster has no folder {home}: {SHARED}")
    os.chdir(home)
    torch.set_num_threads(1)
    with warnings_sent(send):
        return run_job(job, send, _Asked(lambda: tell("tick")))
