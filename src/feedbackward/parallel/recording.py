"""What one forward pass on the example shows of a model that is to be divided: the places where
it may be divided, the order of its modules, and what each of them returns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from feedbackward.activity import Site
from feedbackward.engine.hooks import Observer
from feedbackward.model.example import run
from feedbackward.model.state import preserved

_PLAIN = (bool, int, float, str, bytes, type(None))


@dataclass
class Call:
    """One call of a module: when it began and ended, and its output without values.

    `replaceable`: whether the output consists of tensors and plain values, so that something can
    stand in for it.
    """

    name: str
    start: int
    end: int = -1
    output: Any = None
    replaceable: bool = False


@dataclass
class Recording:
    """Calls in the order in which they began; and of each place its time, shape and dtype.

    `rows`: the size of the example's batch.
    """

    places: tuple[Site, ...]
    rows: int
    calls: list[Call] = field(default_factory=list)
    clock: list[int] = field(default_factory=list)
    kinds: list[tuple[tuple[int, ...], torch.dtype]] = field(default_factory=list)
    output: Any = None

    def span(self, lower: int | None, upper: int | None) -> tuple[float, float]:
        """The times of two places; None stands for the model's input, or its output."""
        begin = -1.0 if lower is None else float(self.clock[lower])
        end = float("inf") if upper is None else float(self.clock[upper])
        return begin, end

    def running(self, lower: int | None, upper: int | None) -> set[str]:
        """The names of the modules that run between two places, or that are open there."""
        begin, end = self.span(lower, upper)
        return {call.name for call in self.calls if call.end > begin and call.start < end}

    def called(self, name: str) -> str:
        """The module of this name, or if it is not called itself the nearest one round it."""
        names = {call.name for call in self.calls}
        while name and name not in names:
            name = name.rpartition(".")[0]
        return name

    def finished(self, lower: int | None) -> dict[str, list[Call]]:
        """The outermost modules whose calls have all ended before a place, with their calls."""
        if lower is None:
            return {}
        now = self.clock[lower]
        calls = defaultdict(list)
        for call in self.calls:
            calls[call.name].append(call)
        over = {
            name: made
            for name, made in calls.items()
            if name and all(call.end < now and call.replaceable for call in made)
        }
        return {
            name: made
            for name, made in over.items()
            if not any(outer in over for outer in _containers(name))
        }


def record(model: nn.Module, example: Any, places: tuple[Site, ...]) -> Recording:
    """Run the model once on the example, as it is, without gradients; nothing of it changes."""
    rows = next(len(t) for t in tree_leaves(example) if isinstance(t, Tensor) and t.dim())
    recording, time = Recording(places, rows), count()
    recording.clock = [-1] * len(places)
    recording.kinds = [((), torch.float32)] * len(places)

    def meet(place: Site, h: Tensor) -> Tensor:
        index = places.index(place)
        if recording.clock[index] < 0:
            recording.clock[index] = next(time)
            recording.kinds[index] = tuple(h.shape[1:]), h.dtype
        return h

    observer = Observer(places, (), meet)
    with (
        preserved(model),
        torch.no_grad(),
        # a place at a layer's input comes before the layer begins, one at its output after it ends
        _installed(observer, model),
        _calls(model, recording, time),
        observer.recording(),
    ):
        recording.output = run(model, example)
    torch.clear_autocast_cache()
    return recording


@contextmanager
def _installed(observer: Observer, model: nn.Module) -> Iterator[None]:
    handles = observer.install(model, prepend=True)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _calls(model: nn.Module, recording: Recording, time: Iterator[int]) -> Iterator[None]:
    """Record the calls of the model and its parts."""
    running: list[Call] = []

    def enter(name: str) -> Callable[..., None]:
        def begin(*call: Any) -> None:
            running.append(Call(name, next(time)))
            recording.calls.append(running[-1])

        return begin

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        call = running.pop()
        call.end = next(time)
        call.replaceable = all(isinstance(t, (Tensor, *_PLAIN)) for t in tree_leaves(output))
        if call.replaceable:
            call.output = tree_map(lambda t: t.to("meta") if isinstance(t, Tensor) else t, output)

    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(enter(name)).remove)
            # before the module's output is met as a place
            stack.callback(module.register_forward_hook(leave, prepend=True).remove)
        yield


def _containers(name: str) -> list[str]:
    """The names of the modules that hold this one."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]
