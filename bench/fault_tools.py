"""For bench/faults.py: a tiny data set and network, commands in forked processes, faults put into them, and the end of a run."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from feedbackward import cli
from feedbackward.experiment.config.schema import TrainConfig
from feedbackward.experiment.data import DataConfig
from feedbackward.experiment.training import checkpoint
from feedbackward.experiment.training.interrupts import InterruptedRunError, Interrupts
from feedbackward.experiment.training.progress import Console, Progress
from feedbackward.experiment.training.runfolder import RunFolder
from feedbackward.experiment.training.train import train

NET = """
import multiprocessing, os, signal, torch
from torch import nn

def net(in_shape, classes):
    return nn.Sequential(
        nn.Conv2d(in_shape[0], 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(),
        nn.Linear(144, 12), nn.Tanh(), nn.Linear(12, classes),
    )

class NaN(nn.Module):
    def forward(self, x):
        return x * float("nan")

def broken(in_shape, classes):
    made = net(in_shape, classes)
    made[6] = NaN()
    return made

def killed(in_shape, classes):
    if torch.initial_seed() == 1 and multiprocessing.parent_process():
        os.kill(os.getpid(), signal.SIGKILL)
    return net(in_shape, classes)

def starved(in_shape, classes):
    if torch.initial_seed() == 1 and multiprocessing.parent_process():
        raise MemoryError("16 GiB")
    return net(in_shape, classes)
"""
CLOCKS = ("seconds", "epoch_seconds", "images_per_second")
# rows written and epoch probed: a run that is stopped after its last probe has counted it, one that is not has not
BOOKS = ("rows", "probed")
TRAINING = "feedbackward.experiment.training"
# phase -> the function at whose call the fault comes, which call, and whether before or after it
PHASES = {
    "decode": ("feedbackward.experiment.data.decode", "image_to_array", 20, "before"),
    "cache": ("feedbackward.experiment.data.cache", "save_file", 1, "after"),
    "first step": (f"{TRAINING}.run", "Run.step", 1, "before"),
    "step": (f"{TRAINING}.run", "Run.step", 8, "after"),
    "evaluation": (f"{TRAINING}.run", "Run.evaluate", 2, "before"),
    "probe": (f"{TRAINING}.run", "Run.probe", 2, "before"),
    "checkpoint, half written": (f"{TRAINING}.checkpoint", "save_file", 2, "after"),
    "checkpoint, just moved": (f"{TRAINING}.checkpoint", "_sync_folder", 6, "before"),
    "metrics": (f"{TRAINING}.record", "Record.add", 3, "after"),
    "export": (f"{TRAINING}.train", "save_file", 1, "after"),
    "test evaluation": (f"{TRAINING}.run", "Run.evaluate", 4, "before"),
    "result": (f"{TRAINING}.runfolder", "RunFolder.write_json", 2, "before"),
}
# the same of a run that has been resumed, counted from there
AGAIN = {
    "again, checkpoint": (f"{TRAINING}.checkpoint", "save_file", 1, "after"),
    "again, just moved": (f"{TRAINING}.checkpoint", "_sync_folder", 4, "before"),
    "again, metrics": (f"{TRAINING}.record", "Record.add", 1, "after"),
    **{f"again, step {n}": (f"{TRAINING}.run", "Run.step", n, "after") for n in range(1, 7)},
}


@dataclass
class Ended:
    """How a command ended: exit code (negative: the signal that killed it) and what it wrote to stderr."""

    code: int
    text: str

    @property
    def clean(self) -> bool:
        return "Traceback" not in self.text


class World:
    """A folder with images, a network and a cache, in which commands run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.out = root / "run"
        (root / "tiny_net.py").write_text(NET)
        draw = np.random.RandomState(0)
        for split, count in (("train", 24), ("validation", 8), ("test", 8)):
            for shade, name in ((60, "ant"), (120, "bee"), (190, "cow")):
                (root / "pets" / split / name).mkdir(parents=True)
                for i in range(count):
                    pixels = draw.randint(shade - 60, shade + 60, (8, 8, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(root / "pets" / split / name / f"{i}.png")

    def train(self, *more: str, out: Path | None = None) -> list[str]:
        """The command of a run: three epochs of five steps, with dropout, batch norm, augmentation and probes."""
        options = {
            "model": "tiny_net:net", "data.name": str(self.root / "pets"), "data.augment": "crop-flip",
            "epochs": "3", "batch_size": "16", "probe_every": "1", "probe_images": "20", "tensorboard": "false",
            "out": str(out or self.out), "resume": "true",
        }  # fmt: skip
        return ["train", *(f"--{key}={value}" for key, value in options.items()), *more]

    def compare(self, model: str = "tiny_net:net", *more: str) -> list[str]:
        """The command of a comparison of two rules and three seeds."""
        shared = [
            option
            for option in self.train()[1:]
            if not option.startswith(("--resume", "--model", "--epochs"))
        ]
        own = ["--rules=[bp,dfa]", "--seeds=[0,1,2]", "--timing_steps=0", "--epochs=1"]
        return ["compare", f"--model={model}", *shared, *own, *more]

    def forget(self) -> None:
        """Remove runs and cache."""
        for folder in (self.out, self.root / "cache"):
            shutil.rmtree(folder, ignore_errors=True)


def command(
    world: World, arguments: list[str], before: Callable[[], Any] = lambda: None, wait: bool = True
) -> Any:
    """Run a command in a forked process, after `before()` in it; the process id without `wait`."""
    log = tempfile.NamedTemporaryFile(prefix="faults-", suffix=".log", delete=False)  # noqa: SIM115
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.chdir(world.root)
            os.environ["FEEDBACKWARD_CACHE"] = str(world.root / "cache")
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            sys.path.insert(0, str(world.root))
            before()
            code = cli.main(arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return ended(child, log.name) if wait else (child, log.name)


def ended(child: int, log: str) -> Ended:
    """Wait for a command."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    text = Path(log).read_text(errors="replace")
    os.unlink(log)
    return Ended(code, text)


def fault_at(phase: str, action: Callable[[], Any]) -> Callable[[], None]:
    """For `command`: do `action()` in that phase."""
    where, name, count, when = (PHASES | AGAIN)[phase]

    def patch() -> None:
        owner: Any = importlib.import_module(where)
        *path, last = name.split(".")
        for part in path:
            owner = getattr(owner, part)
        whole, calls = getattr(owner, last), [0]

        def faulty(*arguments: Any, **more: Any) -> Any:
            calls[0] += 1
            if calls[0] == count and when == "before":
                action()
            result = whole(*arguments, **more)
            if calls[0] == count and when == "after":
                action()
            return result

        setattr(owner, last, faulty)

    return patch


def end_of(out: Path) -> str:
    """A digest of what a finished run left, clocks left out."""
    state = checkpoint.load(out / "checkpoint.safetensors")
    state["position"] = {k: v for k, v in state["position"].items() if k not in CLOCKS + BOOKS}
    digest = hashlib.sha256()
    _add(digest, state)
    digest.update((out / "model.safetensors").read_bytes())
    rows = [{k: v for k, v in row.items() if k not in CLOCKS} for row in RunFolder(out).rows()]
    result = json.loads((out / "result.json").read_text()) | {"seconds": 0}
    _add(digest, [rows, result, json.loads((out / "data.json").read_text())])
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        digest.update(repr((value.dtype, value.shape)).encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, dict):
        for key, item in value.items():
            digest.update(repr(key).encode())
            _add(digest, item)
    elif isinstance(value, list | tuple):
        digest.update(str(len(value)).encode())
        for item in value:
            _add(digest, item)
    else:
        digest.update(repr(value).encode())


@contextlib.contextmanager
def mounted(place: Path, size: str) -> Iterator[None]:
    """A small disk in memory."""
    place.mkdir(exist_ok=True)
    mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place))
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)
        place.rmdir()


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


class After(Interrupts):
    """Stops a run after so many looks."""

    def __init__(self, checks: int) -> None:
        super().__init__()
        self.left = checks

    def check(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise InterruptedRunError(signal.SIGINT)


def config_of(world: World) -> TrainConfig:
    """The run of `trained`."""
    data = DataConfig(str(world.root / "pets"), augment="crop-flip")
    return TrainConfig(model="tiny_net:net", data=data, batch_size=16, tensorboard=False)


def trained(config: TrainConfig, interrupts: Interrupts) -> None:
    """Train in this process."""
    with Progress(Console(quiet=True)) as progress:
        train(config, progress, interrupts)
