"""One stage's part of a model: the model's own forward pass, entered at one place and left at
another. Modules that end before the part are replaced by what they returned in form."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from feedbackward.activity import Site, Source
from feedbackward.engine.hooks import Hooked, PassOverError
from feedbackward.engine.weights import digest
from feedbackward.errors import SiteError
from feedbackward.model.example import run
from feedbackward.model.state import forward_of
from feedbackward.parallel.recording import Call, Recording


class Part:
    """The part between two places of a recording; None stands for the model's input or output.

    Attributes:
        running: the names of the modules that run in it.
        sources: the tensors, by name, of the sources in the latest pass.
        number: identifies a pass, so that random numbers in it are the same however the model is
            divided. Set it before a pass and before its backward.
    """

    def __init__(
        self,
        model: nn.Module,
        recording: Recording,
        lower: int | None,
        upper: int | None,
        sources: Sequence[Source] = (),
        cut_sources: Sequence[Source] = (),
    ) -> None:
        self.model, self.recording, self.lower, self.upper = model, recording, lower, upper
        self.running = recording.running(lower, upper)
        self.finished = recording.finished(lower)
        # what lies above a source that is cut as well sees another tensor
        self._entry = _Entry(recording.places, lower, tuple(cut_sources))
        leave = () if upper is None else (recording.places[upper],)
        self._exit = _Exit(leave, tuple(sources))
        self._blanks = _Blanks()
        self._devices = list({p.device for p in model.parameters() if p.device.type == "cuda"})
        self._handles = [
            *self._entry.install(model, prepend=True),
            *self._exit.install(model),
        ]

    @property
    def number(self) -> tuple[int, ...]:
        return self._entry.number

    @number.setter
    def number(self, number: tuple[int, ...]) -> None:
        self._entry.number = number

    @property
    def sources(self) -> dict[str, Tensor]:
        return {**self._entry.tensors, **self._exit.tensors}

    def run(self, call: Callable[..., Any], inputs: Any, rows: int, received: Tensor | None) -> Any:
        """The activity at the upper place, or the model's output.

        `call`: the model, or what runs it. `rows`: the size of the batch. `received`: the activity
        at the lower place.
        """
        self._entry.received, self._entry.tensors, self._exit.tensors = received, {}, {}
        grad = torch.is_grad_enabled()
        self._entry.grad = grad
        try:
            with (
                self._stand_ins(rows, received),
                self._entry.recording() as tape,
                self._exit.recording() as end,
                torch.random.fork_rng(devices=self._devices),
            ):
                tape.over = end.over = True
                torch.set_grad_enabled(grad and self.lower is None)
                self._entry.seed(-1)
                return run(call, inputs)
        except PassOverError:
            assert self._exit.left is not None
            return self._exit.left
        finally:
            torch.set_grad_enabled(grad)
            self._entry.received = self._exit.left = None

    @contextmanager
    def _stand_ins(self, rows: int, received: Tensor | None) -> Iterator[None]:
        """The finished modules return zeros of the form that they had on the example."""
        with ExitStack() as stack:
            for name, calls in self.finished.items():
                assert received is not None
                forward = _StandIn(calls, self.recording.rows, rows, self._blanks, received.device)
                stack.enter_context(forward_of(self.model.get_submodule(name), forward))
            yield

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()


class _Gate(Hooked):
    """Keeps sources as they pass."""

    def __init__(self, places: tuple[Site, ...], sources: tuple[Source, ...]) -> None:
        super().__init__(places, sources)
        self.tensors: dict[str, Tensor] = {}

    def on_source(self, index: int, tensor: Tensor) -> Tensor:
        if self.tape is None:
            return tensor
        if torch.is_grad_enabled() and not tensor.requires_grad:
            tensor = tensor.detach().requires_grad_().clone()
        self.tensors[self.sources[index].name] = tensor
        return tensor


class _Entry(_Gate):
    """Puts the received activity in its place, and seeds the random generators at every place."""

    def __init__(
        self, places: tuple[Site, ...], lower: int | None, sources: tuple[Source, ...]
    ) -> None:
        super().__init__(places, sources)
        self.lower, self.grad = lower, True
        self.number: tuple[int, ...] = (0,)
        self.received: Tensor | None = None

    def on_site(self, index: int, h: Tensor) -> Tensor:
        if self.tape is None:
            if torch._C._current_graph_task_id() != -1:  # a checkpoint repeats a module
                self.seed(index)
            return h
        first = not self.tape.seen[index]
        self.tape.seen[index] += 1
        if first:
            self.seed(index)
        if index != self.lower:
            return h
        assert self.received is not None
        if first and h.shape != self.received.shape:
            raise SiteError(
                f"the stage below sent {list(self.received.shape)} for {self.sites[index].name!r}, but the model's "
                f"pass is at {list(h.shape)}: give every rank the same batch."
            )
        torch.set_grad_enabled(self.grad)
        if self.received.requires_grad and first:
            # what follows may work in place, which a leaf does not allow
            self.received = self.received.clone()
        return self.received

    def seed(self, index: int) -> None:
        """Begin the random numbers that belong to this place of this pass."""
        number = digest(*self.number, index)
        torch.default_generator.manual_seed(number)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed(number)


class _Exit(_Gate):
    """Ends the pass at a place, and keeps the sources as they are above their broadcast."""

    def __init__(self, places: tuple[Site, ...], sources: tuple[Source, ...]) -> None:
        super().__init__(places, sources)
        self.left: Tensor | None = None

    def on_site(self, index: int, h: Tensor) -> Tensor:
        if self.tape is None:
            return h
        self.left = h
        raise PassOverError


class _Blanks:
    """Zeros of any shape, all in one piece of memory: nothing reads them, so they need not be filled for every pass."""

    def __init__(self) -> None:
        self._held: dict[torch.dtype, Tensor] = {}

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        size, held = math.prod(shape), self._held.get(dtype)
        # a version: something between two finished modules works in place
        if held is None or len(held) < size or held._version:
            held = self._held[dtype] = torch.zeros(size, dtype=dtype, device=device)
        return held[:size].view(tuple(shape))


class _StandIn:
    """Returns, call by call, zeros for `rows` rows of what was recorded with `recorded` rows."""

    def __init__(
        self, calls: list[Call], recorded: int, rows: int, blanks: _Blanks, device: torch.device
    ) -> None:
        self.calls, self.recorded, self.rows = calls, recorded, rows
        self.blanks, self.device = blanks, device
        self.next = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.calls[self.next % len(self.calls)]
        self.next += 1
        return tree_map(self._zeros, call.output)

    def _zeros(self, t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        shape = list(t.shape)
        if shape and shape[0] == self.recorded:
            shape[0] = self.rows
        return self.blanks.zeros(shape, t.dtype, self.device)
