"""What a training step costs: its time, and the most memory that is alive during it."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WARM_UP = 3  # steps: allocators, autotuning, compilation, optimizer state


def step_times(steps: Sequence[Callable[[], Any]], repeats: int, device: torch.device) -> list[float]:
    """Median milliseconds of each of the functions, called in turn so that a slow moment hits all alike."""
    for step in steps:
        for _ in range(WARM_UP):
            step()
    spent: list[list[float]] = [[] for _ in steps]
    for repeat in range(repeats):
        for offset in range(len(steps)):
            index = (repeat + offset) % len(steps)  # each follows each other one
            _wait(device)
            start = time.perf_counter()
            steps[index]()
            _wait(device)
            spent[index].append(1000 * (time.perf_counter() - start))
    return [statistics.median(times) for times in spent]


def peak_bytes(step: Callable[[], Any], alive: Iterable[Tensor], device: torch.device) -> int:
    """The most bytes of tensors alive at any moment of one step, weights and optimizer included.

    Take a step before: the first one makes the optimizer's state. On CUDA the allocator tells. On the CPU
    every tensor that a step makes is counted from its birth to its death, besides those in ``alive``; the
    scratch memory inside a kernel is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    with LiveBytes(alive) as live:
        step()
    return live.peak


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of all tensor storages that are alive, and the highest sum so far in `peak`."""

    def __init__(self, alive: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()
        for tensor in alive:
            self._see(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
