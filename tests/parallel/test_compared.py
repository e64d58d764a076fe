"""A comparison whose cells are divided over several processes."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ranks import needs_gloo

from feedbackward.cli import main
from feedbackward.experiment.config.parallel import Parallel
from feedbackward.experiment.config.schema import TrainConfig
from feedbackward.experiment.data.dataset import DataConfig
from feedbackward.experiment.grid.cells import Job, Outcome
from feedbackward.experiment.grid.divided import run_divided
from feedbackward.experiment.training.interrupts import Interrupts

pytestmark = needs_gloo

NET = """
import os, signal, time
from pathlib import Path
from torch import nn

class Dying(nn.Linear):
    def forward(self, x):
        if self.training and os.environ.get("RANK") == "1" and Path("die").exists():
            Path("die").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.training and Path("slow").exists():
            time.sleep(0.2)
        return super().forward(x)

def make(classes):
    print("a line of the model's own")
    layers = [nn.Linear(784, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), Dying(16, 16), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(16, classes))
"""


@pytest.fixture
def job(home: Path) -> Job:
    (home / "cellnet.py").write_text(NET)
    config = TrainConfig(
        model="cellnet:make", rule="dkp", epochs=3, batch_size=20, resume=True, out="cell",
        data=DataConfig(train_limit=200, validation=50, test_limit=50), tensorboard=False, threads=1,
        parallel=Parallel(pipeline=2, micro_batches=2, timeout=60.0),
    )  # fmt: skip
    return Job("", config.resolved(), ("", "", ""), "", 600)


def whole(job: Job) -> bytes:
    """The weights that one process reaches."""
    one = replace(job.config, parallel=replace(job.config.parallel, pipeline=1), out="whole")
    flags = ["--config", str(job.folder.config_file), "--parallel.pipeline", "1", "--out", "whole"]
    assert main(["train", *flags]) == 0
    return Path(str(one.out), "model.safetensors").read_bytes()


def run(job: Job, interrupts: Interrupts | None = None) -> tuple[Outcome, list[tuple[str, Any]]]:
    events: list[tuple[str, Any]] = []

    def send(kind: str, value: Any) -> None:
        events.append((kind, value))
        if kind == "begin" and interrupts is not None:
            interrupts._note(signal.SIGTERM, None)

    return run_divided(job, send, interrupts or Interrupts()), events


@pytest.mark.nightly
def test_a_stopped_cell_is_gone_on_with(job: Job) -> None:
    """It saves itself, and ends with the weights of one process that nothing disturbed."""
    # it must not end before the signal reaches it
    Path("slow").touch()
    outcome, events = run(job, Interrupts())
    Path("slow").unlink()
    assert outcome.status == "stopped"
    assert job.folder.checkpoint.exists()
    assert ("say", "a line of the model's own") in events
    outcome, events = run(job)
    assert outcome.status == "done"
    assert outcome.result == job.folder.result()
    assert any("resumed" in str(value) for _, value in events)
    assert job.folder.model.read_bytes() == whole(job)


@pytest.mark.nightly
def test_a_killed_process_fails_its_cell(job: Job) -> None:
    Path("die").touch()
    outcome, _ = run(job)
    assert outcome.status == "failed"
    assert "rank 1 of its processes died with exit code -9" in outcome.message
    outcome, _ = run(job)
    assert outcome.status == "done"


@pytest.mark.nightly
def test_a_refused_cell_says_why(job: Job) -> None:
    refused = replace(job, config=replace(job.config, rule="weight_mirror", model="mlp"))
    outcome, _ = run(refused)
    assert outcome.status == "refused"
    assert "Weight mirror cannot be divided" in outcome.message
    schedule = replace(job.config, schedule="replay", out="other")
    outcome, _ = run(replace(job, config=schedule))
    assert outcome.status == "refused"
    assert "schedule is replay" in outcome.message
