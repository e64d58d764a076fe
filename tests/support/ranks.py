"""Real processes for tests: a function run on several ranks, and what each returned or raised."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

# one process imports torch, and the ranks are its forks
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["feedbackward.parallel.stage"])
# for what is expected to end much sooner, on a busy machine
LONGEST = 300.0

needs_gloo = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo"),
]


@dataclass(frozen=True)
class Failure:
    """An exception of a rank: its class's name and its message."""

    kind: str
    text: str

    def __getitem__(self, key: str) -> Any:
        raise AssertionError(f"a rank raised {self.kind}: {self.text}")


def chosen(request: pytest.FixtureRequest, parameter: str) -> list[Any]:
    """The values of a parameter with which tests of this module will run: processes need not work for those left out."""
    calls = [
        getattr(item, "callspec", None)
        for item in request.session.items
        if item.path == request.path
    ]
    found = [
        call.params[parameter] for call in calls if call is not None and parameter in call.params
    ]
    return list(dict.fromkeys(found))


def run_ranks(work: Callable[..., Any], ranks: int, folder: Path, *args: Any) -> list[Any]:
    """`work(rank, *args)` on every rank, in one gloo group; what each returned, a `Failure` where it
    raised, None where it was killed. Tensors and plain values only are returned."""
    folder.mkdir(exist_ok=True)
    processes = [
        CONTEXT.Process(target=_rank, args=(work, rank, ranks, folder, args))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LONGEST)
        if process.is_alive():
            process.kill()
            process.join()
    return [_result(folder / f"{rank}.pt") for rank in range(ranks)]


def _result(path: Path) -> Any:
    if not path.exists():
        return None
    found = torch.load(path, weights_only=True)
    return Failure(*found["failure"]) if "failure" in found else found["result"]


def _rank(
    work: Callable[..., Any], rank: int, ranks: int, folder: Path, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=LONGEST),
    )
    try:
        found: dict[str, Any] = {"result": work(rank, *args)}
    except Exception as error:
        found = {"failure": (type(error).__name__, str(error))}
    torch.save(found, folder / f"{rank}.part")
    os.replace(folder / f"{rank}.part", folder / f"{rank}.pt")
    # without goodbyes: another rank may have failed
    os._exit(0)
