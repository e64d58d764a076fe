"""`feedbackward train` under torchrun: the files of one process, whatever happens on the way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import needs_gloo

from feedbackward.cli import main

pytestmark = needs_gloo

# a net in which a rank dies in a step of training, once
DYING = """
import os, signal
from pathlib import Path
from torch import nn

class Layer(nn.Linear):
    def forward(self, x):
        mark = Path("die")
        if self.training and os.environ.get("RANK") == "1" and mark.exists():
            seen = len(mark.read_text())
            mark.write_text("x" * (seen + 1))
            if seen == 40:
                mark.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)

def make(classes):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(28 * 28, 16), nn.BatchNorm1d(16), nn.ReLU(),
        Layer(16, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, classes),
    )
"""
COMMON = [
    "--model=dying:make", "--rule=dkp", "--epochs=3", "--batch-size=32", "--data.train-limit=300",
    "--data.validation=50", "--data.test-limit=60", "--no-tensorboard", "--threads=1", "--parallel.timeout=100",
]  # fmt: skip
FLAGS = [*COMMON, "--parallel.micro-batches", "3"]


def torchrun(folder: Path, ranks: int, *arguments: str, restarts: int = 0) -> tuple[int, str]:
    """The exit code and the output of a run of so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", f"--max-restarts={restarts}", "-m", "feedbackward"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (home / "dying.py").write_text(DYING)
    monkeypatch.syspath_prepend(str(home))
    monkeypatch.delitem(sys.modules, "dying", raising=False)
    return home


def whole(folder: Path) -> bytes:
    """The weights after a run of one process, which no one disturbs."""
    assert main(["train", *FLAGS, "--parallel.pipeline", "1", "--out", "alone"]) == 0
    return (folder / "alone" / "model.safetensors").read_bytes()


@pytest.mark.nightly
def test_a_killed_run_is_started_again(folder: Path) -> None:
    """torchrun starts the ranks again, they go on from the last epoch, and the weights are those of
    an unbroken run of one process, byte by byte; only one process reports."""
    (folder / "die").touch()
    code, text = torchrun(
        folder, 2, "train", *FLAGS, "--parallel.pipeline", "2", "--out", "two", restarts=2
    )
    assert code == 0, text
    assert not (folder / "die").exists()
    assert "resumed two in epoch 2" in text
    assert text.count("test accuracy") == 1
    assert (folder / "two" / "model.safetensors").read_bytes() == whole(folder)


def test_resumed_by_another_number_of_processes(folder: Path) -> None:
    (folder / "die").touch()
    code, text = torchrun(folder, 2, "train", *FLAGS, "--parallel.pipeline", "2", "--out", "two")
    assert code != 0
    assert "rank 1 of the pipeline" in text
    resumed = ["train", *FLAGS, "--parallel.pipeline", "1", "--out", "two", "--resume"]
    assert main(resumed) == 0
    assert (folder / "two" / "model.safetensors").read_bytes() == whole(folder)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--parallel.pipeline", "2"], "torchrun --nproc-per-node 2"),
        (["--parallel.pipeline", "2", "--parallel.data", "2"], "needs 4 processes"),
        (["--parallel.pipeline", "1", "--schedule", "replay"], "schedule"),
        (["--parallel.pipeline", "1", "--forward.clip", "1"], "forward.clip"),
        (["--parallel.pipeline", "1", "--probe-every", "1"], "probe_every"),
        (["--parallel.pipeline", "1", "--parallel.micro-batches", "0"], "micro_batches"),
    ],
)
def test_what_cannot_be_divided(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    assert main(["train", *COMMON, *flags, "--out", "refused"]) == 2
    assert words in capsys.readouterr().err
    assert not Path("refused").exists()


@pytest.mark.nightly
def test_example_on_three_processes(tmp_path: Path) -> None:
    """`python examples/pipeline.py` and three processes print the same losses."""
    script = Path(__file__).parents[2] / "examples" / "pipeline.py"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    printed = []
    for before in ([], launcher):
        done = subprocess.run(
            [sys.executable, *before, str(script)],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stderr
        printed.append([line for line in done.stdout.splitlines() if line.startswith("epoch")])
    assert printed[0] == printed[1]
    assert len(printed[0]) == 10
