"""What a training step costs: its time, and the most memory that is alive during it."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WARM_UP = 3  # steps: allocators, autotuning, compilation, optimizer state


def step_times(
    steps: Sequence[Callable[[], Any]], repeats: int, device: torch.device
) -> list[float]:
    """Median milliseconds of each of the functions; see `rounds`."""
    return [statistics.median(times) for times in zip(*rounds(steps, repeats, device), strict=True)]


def rounds(
    steps: Sequence[Callable[[], Any]],
    count: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[list[float]]:
    """Milliseconds of each of the functions, round by round, after `WARM_UP` calls of each.

    A round calls each once, so that a slow moment hits all alike, in an order that rotates: each follows each other one.
    `clock` gives seconds.
    """
    for step in steps:
        for _ in range(WARM_UP):
            step()
    for turn in range(count):
        spent = [0.0] * len(steps)
        for offset in range(len(steps)):
            index = (turn + offset) % len(steps)
            _wait(device)
            start = clock()
            steps[index]()
            _wait(device)
            spent[index] = 1000 * (clock() - start)
        yield spent


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


def activation_bytes(
    step: Callable[[], Any],
    held: Iterable[Tensor],
    parameters: Iterable[nn.Parameter],
    device: torch.device,
) -> int:
    """The most bytes alive at any moment of one step besides `held` and the gradients of `parameters`.

    `held` is what lives between steps: weights, buffers, feedback, the optimizer's state, the batch. Take a step before.
    On the CPU every tensor of the step is counted from birth to death, temporaries too, and a gradient at no time; scratch
    memory inside a kernel is not seen. On CUDA the allocator tells: scratch memory counts, and so does a gradient from
    birth until it is accumulated.
    """
    parameters = [p for p in parameters if p.requires_grad]
    if device.type == "cuda":
        return _allocated_beyond(step, parameters, device)
    gradients: set[int] = set()
    with (
        LiveBytes(held) as live,
        _on_gradient(parameters, lambda grad: gradients.add(live.number(grad))),
    ):
        step()
    return live.peak_without({*live.first, *gradients})


def _allocated_beyond(
    step: Callable[[], Any], parameters: Sequence[nn.Parameter], device: torch.device
) -> int:
    """What CUDA's allocator gave out beyond what it held before and the gradients so far, at most."""
    for p in parameters:
        p.grad = None
    torch.cuda.synchronize(device)
    base, most = torch.cuda.memory_allocated(device), 0

    def look() -> None:
        nonlocal most
        most = max(most, torch.cuda.max_memory_allocated(device) - base)
        torch.cuda.reset_peak_memory_stats(device)

    def accumulated(grad: Tensor) -> None:
        nonlocal base
        look()
        base += -(-grad.untyped_storage().nbytes() // 512) * 512  # the allocator's blocks

    torch.cuda.reset_peak_memory_stats(device)
    with _on_gradient(parameters, accumulated):
        step()
    torch.cuda.synchronize(device)
    look()
    return most


@contextmanager
def _on_gradient(
    parameters: Iterable[nn.Parameter], told: Callable[[Tensor], object]
) -> Iterator[None]:
    """Tell of each gradient as soon as it has been accumulated."""

    def hook(parameter: Tensor) -> None:
        if parameter.grad is not None:
            told(parameter.grad)

    handles = [p.register_post_accumulate_grad_hook(hook) for p in parameters]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of all tensor storages that are alive, and the highest sum so far in `peak`.

    `first`: the numbers of the storages that were `alive` at the start.
    """

    def __init__(self, alive: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[
            int, int
        ] = {}  # each living storage's number; an address may be used again
        self._log: list[tuple[int, int]] = []  # number, and bytes gained or lost
        self._count = 0
        for tensor in alive:
            self._see(tensor)
        self.first = set(self._known.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def number(self, tensor: Tensor) -> int:
        """The number of a tensor's storage, which tells it from all others of this time."""
        self._see(tensor)
        return self._known[tensor.untyped_storage()._cdata]

    def peak_without(self, numbers: Container[int]) -> int:
        """The highest sum of all storages but these."""
        now = peak = 0
        for number, size in self._log:
            if number not in numbers:
                now += size
                peak = max(peak, now)
        return peak

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known[key] = self._count
        self._count += 1
        self._change(self._known[key], size)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._change(self._known.pop(key), -size)

    def _change(self, number: int, size: int) -> None:
        self._log.append((number, size))
        self.now += size
        self.peak = max(self.peak, self.now)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
