"""A cell on several processes: torchrun starts them, and rank 0 tells what happens.

`python -m feedbackward.experiment.grid.divided JOB.json` is one of these processes.
"""

from __future__ import annotations

import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

from feedbackward.experiment.config.files import from_dict, to_dict
from feedbackward.experiment.config.schema import TrainConfig
from feedbackward.experiment.grid.cells import (
    ENDED,
    Job,
    Outcome,
    Send,
    keep_reason,
    run_cell,
    warnings_sent,
)
from feedbackward.experiment.grid.optuna_search import Pruning
from feedbackward.experiment.training.interrupts import Interrupts

# begins a line of ours (RFC 7464): a model may print too
MARK = "\x1e"
POLL = 0.2  # seconds between two looks at signals and workers


def run_job(job: Job, send: Send, interrupts: Interrupts) -> Outcome:
    """Run a cell: in this process, or in as many as it is divided over."""
    if job.config.parallel.processes == 1:
        return run_cell(job, send, interrupts)
    return run_divided(job, send, interrupts)


def run_divided(job: Job, send: Send, interrupts: Interrupts) -> Outcome:
    """Train a cell by processes of its own, and report how it ended, as `run_cell` does."""
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "errors").open("w+") as errors:
        file = Path(folder) / "job.json"
        file.write_text(json.dumps({**asdict(job), "config": to_dict(job.config)}))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(job.config.parallel.processes), "-m", __name__]
        process = subprocess.Popen(
            [*command, str(file)],
            env={"OMP_NUM_THREADS": "1", **os.environ},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            # Ctrl-C comes to this process, which tells them
            start_new_session=True,
        )
        try:
            outcome = _listen(process, send, interrupts)
        finally:
            process.terminate()
            process.wait()
        if outcome is None:
            outcome = Outcome("stopped") if interrupts.signum else _died(errors)
            keep_reason(job, outcome)
    return replace(outcome, result=job.folder.result()) if outcome.status in ENDED else outcome


def _listen(process: subprocess.Popen[str], send: Send, interrupts: Interrupts) -> Outcome | None:
    """Pass on what rank 0 tells, until all have ended; how the cell ended, None if it did not say."""
    outcome, told = None, False
    for line in _lines(process):
        if interrupts.signum and not told:
            told = True
            process.terminate()  # torchrun hands it to its processes, which save the run
        if line is None:
            continue
        if not line.startswith(MARK):
            send("say", line.rstrip("\n"))
            continue
        kind, value = json.loads(line.removeprefix(MARK))
        if kind == "end":
            outcome = Outcome(*value)
        else:
            send(kind, value)
    return outcome


def _lines(process: subprocess.Popen[str]) -> Iterator[str | None]:
    """What the processes print, and None whenever they print nothing for a moment."""
    found: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            found.put(line)
        found.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = found.get(timeout=POLL)
        except queue.Empty:
            yield None
            continue
        if line is None:
            return
        yield line


def _died(errors: IO[str]) -> Outcome:
    """Of processes that could not say why they ended: torchrun knows which was the first."""
    errors.seek(0)
    text = errors.read()
    _, _, cause = text.rpartition("Root Cause")
    found = re.search(r"rank\s*:\s*(\d+).*?exitcode\s*:\s*(-?\d+)", cause, re.DOTALL)
    if found is None:
        return Outcome("failed", f"its processes died: {' '.join(text.split())[-500:]}")
    rank, code = found.groups()
    why = " (-9 often means too little memory: use fewer --workers)" if code == "-9" else ""
    return Outcome("failed", f"rank {rank} of its processes died with exit code {code}{why}")


def main() -> None:
    """One of the processes."""
    found: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    config = replace(from_dict(TrainConfig, found.pop("config"), sys.argv[1]), resume=True)
    if pruning := found.pop("pruning"):
        pruning = Pruning(**pruning)
    job = Job(config=config, pruning=pruning, **{**found, "group": tuple(found["group"])})
    leads = os.environ["RANK"] == "0"

    def send(kind: str, value: Any) -> None:
        if leads:
            print(MARK + json.dumps([kind, value]), flush=True)

    with Interrupts() as interrupts, warnings_sent(send):
        outcome = run_cell(job, send, interrupts)
    send("end", (outcome.status, outcome.message))


if __name__ == "__main__":
    main()
