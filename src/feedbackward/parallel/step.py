"""One step of one rank: its micro-batches, the messages that it waits for, and those it sends."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map_only

from feedbackward.activity import Source
from feedbackward.engine.target import Target
from feedbackward.errors import DivergenceError
from feedbackward.model.values import tensors_in
from feedbackward.parallel.division import Division
from feedbackward.parallel.mail import Mail, Message
from feedbackward.parallel.segment import BOUNDARY, Forward, StageModule
from feedbackward.schedules.passes import no_error

LossFn = Callable[[Any, Any], Tensor]
# what a rank did, with which micro-batch, from when to when
Event = tuple[str, int, int, float, float]


@dataclass(frozen=True)
class Batch:
    """A rank's view of a step: the batch in micro-batches, and how many rows each has."""

    number: int
    inputs: Sequence[Any]
    targets: Sequence[Any]
    sizes: Sequence[int]
    loss_fn: LossFn

    @property
    def rows(self) -> int:
        return sum(self.sizes)


def sizes_of(rows: int, micro_batches: int, least: int) -> list[int]:
    """The sizes of the micro-batches; fewer ones where they would be smaller than `least`.

    Example:
        >>> from feedbackward.parallel.step import sizes_of
        >>> sizes_of(18, micro_batches=4, least=2), sizes_of(5, micro_batches=4, least=2)
        ([5, 5, 4, 4], [3, 2])
    """
    parts = max(1, min(micro_batches, rows // max(1, least)))
    return [rows // parts + (i < rows % parts) for i in range(parts)]


def cut_rows(value: Any, sizes: Sequence[int]) -> list[Any]:
    """A batch in pieces; what is not as long as the batch goes into every piece as it is."""
    if not any(isinstance(t, Tensor) for t in tree_leaves(value)):
        return [value] * len(sizes)
    rows, pieces, start = sum(sizes), list[Any](), 0
    for size in sizes:
        part = slice(start, start + size)
        pieces.append(tree_map_only(Tensor, _Rows(rows, part), value))
        start += size
    return pieces


@dataclass(frozen=True)
class _Rows:
    """Takes some rows of the tensors that are as long as the batch."""

    rows: int
    part: slice

    def __call__(self, t: Tensor) -> Tensor:
        return t[self.part] if t.dim() and len(t) == self.rows else t


class Steps:
    """The worker of a rank. `module`: what it runs. `trace`: events, where they are wanted."""

    def __init__(
        self, module: StageModule, division: Division, mail: Mail, stage: int, seed: tuple[int, int]
    ) -> None:
        self.module, self.division, self.mail, self.stage = module, division, mail, stage
        self.seed = seed
        self.last = stage == division.stages - 1
        self.device = next(p.device for p in module.parameters() if not p.is_meta)
        routes = division.routes
        self.awaited = routes.awaited(stage)
        self.numbers = {s.name: i for i, s in enumerate(routes.graph.sources)}
        self.listeners = {s.name: routes.listeners(s) for s in module.sends}
        self.sources = {s.name: s for s in routes.graph.sources}
        self.gives_gradient = stage > 0 and routes.uncut[stage - 1]
        self.takes_gradient = routes.uncut[stage]
        self.call: Callable[..., Forward] = module
        self.trace: list[Event] | None = None
        self.losses: dict[int, Tensor] = {}
        self._batch: Batch
        self._passes: dict[tuple[int, int], Forward] = {}
        self._batches: dict[int, Batch] = {}
        self._bad = ""
        self._evaluations = 0
        # how many backward passes of this step have ended
        self._ended = 0
        # a rank that waits for nothing in its backward passes may run them whenever it waits for an input
        self._fills_waits = stage > 0 and not self.awaited and not self.takes_gradient
        self.delay = 0

    def begin(self, batch: Batch) -> None:
        """Post every receive of the step."""
        self._batch = batch
        self._batches[batch.number] = batch
        self._bad, self._ended = "", 0
        if self.delay:
            self.call = self._frozen_call()
        for index, rows in enumerate(batch.sizes):
            if self.stage:
                self._expect(
                    "activation", index, rows, *self._kind(self.division.cut[self.stage - 1])
                )
        for index, rows in enumerate(batch.sizes):
            for source in self.awaited:
                kind = source.shape, self.module.error_dtype
                peer = self.division.routes.source_stage[source.name]
                self._expect("error", index, rows, *kind, peer, self.numbers[source.name])
            if self.takes_gradient:
                kind = self._kind(self.division.cut[self.stage])
                self._expect("gradient", index, rows, *kind, self.stage + 1)
        if not self.last:
            message = self._message("loss", batch.number, 0, self.division.stages - 1)
            self.mail.expect(message, (), torch.float64, self.device)

    @property
    def parts(self) -> int:
        """How many micro-batches the step goes through, forward or backward."""
        late = self._batches.get(self._batch.number - self.delay, self._batch)
        return max(len(self._batch.sizes), len(late.sizes))

    def _frozen_call(self) -> Callable[..., Forward]:
        """The stage with the weights and feedback of this moment, which the optimizer will change
        before the backward pass; gradients go to the parameters."""
        own = self.module.named_parameters()
        now = {name: p.clone() for name, p in own if p.requires_grad and not p.is_meta}
        return lambda *args: functional_call(self.module, now, args)

    def _kind(self, place: int) -> tuple[tuple[int, ...], torch.dtype]:
        return self.division.recording.kinds[place]

    def _expect(
        self,
        what: Any,
        index: int,
        rows: int,
        shape: Sequence[int],
        dtype: torch.dtype,
        peer: int | None = None,
        name: int = 0,
    ) -> None:
        peer = self.stage - 1 if peer is None else peer
        message = self._message(what, self._batch.number, index, peer, name)
        noticed = what == "activation" and self._fills_waits
        self.mail.expect(message, (rows, *shape), dtype, self.device, noticed)

    @staticmethod
    def _message(what: Any, step: int, index: int, peer: int, name: int = 0) -> Message:
        return Message(what, peer, step, index, name)

    def forward(self, index: int) -> Any:
        """The forward pass of a micro-batch; of the last stage, its part of the loss."""
        batch, received = self._batch, None
        if index >= len(batch.sizes):  # the late batch has more parts
            return torch.zeros(())
        if self.stage:
            message = self._message("activation", batch.number, index, self.stage - 1)
            received = self._timed("wait", index, lambda: self.mail.receive(message))
            received.requires_grad_(self.gives_gradient)
        rows = batch.sizes[index]
        share = rows / batch.rows
        target = self._target(batch.targets[index], share)
        self.module.part.number = (*self.seed, batch.number, index)
        forward = self._timed(
            "forward", index, lambda: self.call(batch.inputs[index], rows, received, target)
        )
        self._passes[batch.number, index] = forward
        if not self.last:
            self._send_up(index, forward.output)
            self._watch(forward, batch.number, index, self.listeners)
            return forward.output
        loss = batch.loss_fn(forward.output, batch.targets[index]) * share
        self._give_errors(forward, loss, batch.number, index)
        self._add_loss(loss, index)
        forward.output = loss
        return loss

    def due_before(self, index: int) -> int | None:
        """The micro-batch whose backward may run now: the input of `index` has not arrived, and no error is waited for."""
        if not self._fills_waits or self._ended >= index or index >= len(self._batch.sizes):
            return None
        message = self._message("activation", self._batch.number, index, self.stage - 1)
        return None if self.mail.arrived(message) else self._ended

    def has_ended(self, index: int) -> bool:
        """Whether the backward of a micro-batch has been run in this step."""
        return index < self._ended

    def evaluate(self, inputs: Any, rows: int) -> Any:
        """The model's output, passed on to every rank."""
        number, received, last = self._evaluations, None, self.division.stages - 1
        self._evaluations += 1
        output = self.division.recording.output
        sent = isinstance(output, Tensor)
        if self.stage:
            message = self._message("evaluated", number, 0, self.stage - 1)
            shape, dtype = self._kind(self.division.cut[self.stage - 1])
            self.mail.expect(message, (rows, *shape), dtype, self.device)
            received = self.mail.receive(message)
        self.module.part.number = (*self.seed, -1, number)
        found = self.call(inputs, rows, received, None).output
        if not self.last:
            self.mail.send(self._message("evaluated", number, 0, self.stage + 1), found)
            if not sent:
                return None
            message = self._message("output", number, 0, last)
            self.mail.expect(message, (rows, *output.shape[1:]), output.dtype, self.device)
            found = self.mail.receive(message)
        elif sent:
            for peer in range(self.stage):
                self.mail.send(self._message("output", number, 0, peer), found)
        self.mail.settle()
        return found

    def _target(self, target: Any, share: float) -> Target | None:
        needed = self.module.needs_target
        return Target(target, share) if needed and isinstance(target, Tensor) else None

    def _send_up(self, index: int, output: Tensor) -> None:
        shape, dtype = self._kind(self.division.cut[self.stage])
        if output.dtype != dtype or tuple(output.shape[1:]) != shape:
            place = self.division.recording.places[self.division.cut[self.stage]].name
            raise DivergenceError(
                f"the activity at {place!r} is {list(output.shape[1:])} in {output.dtype}, and on the example it was "
                f"{list(shape)} in {dtype}: make the pipeline with an example of this size, under the same autocast."
            )
        self.mail.send(
            self._message("activation", self._batch.number, index, self.stage + 1), output
        )

    def _give_errors(self, forward: Forward, loss: Tensor, step: int, index: int) -> None:
        """Send the errors of the output at once, before any backward."""
        outputs = {id(t) for t in tensors_in(forward.output)}
        early = {n: t for n, t in forward.sources.items() if id(t) in outputs}
        if early:
            found = torch.autograd.grad(
                loss, list(early.values()), retain_graph=True, allow_unused=True
            )
            for name, error in zip(early, found, strict=True):
                if error is None:
                    raise no_error(name)
                self._send_error(name, error, step, index)
        self._watch(forward, step, index, [n for n in self.listeners if n not in early])

    def _watch(self, forward: Forward, step: int, index: int, names: Any) -> None:
        """Send the errors of inner sources when the backward pass gets to them."""
        for name in names:
            forward.sources[name].register_hook(
                lambda error, name=name: self._send_error(name, error, step, index)
            )

    def _send_error(self, name: str, error: Tensor, step: int, index: int) -> None:
        error = error.detach().to(self.module.error_dtype)
        self._check(error, f"the error of {name!r}")
        for peer in self.listeners[name]:
            self.mail.send(self._message("error", step, index, peer, self.numbers[name]), error)

    def _add_loss(self, loss: Tensor, index: int) -> None:
        number, part = self._batch.number, loss.detach().double()
        self.losses[number] = self.losses.get(number, torch.zeros_like(part)) + part
        if index == len(self._batch.sizes) - 1:
            self._check(self.losses[number], "the loss")
            for peer in range(self.stage):
                self.mail.send(self._message("loss", number, 0, peer), self.losses[number])

    def loss(self, number: int) -> Tensor:
        """The loss of a step; of other stages than the last, wait for it."""
        if number not in self.losses:
            message = self._message("loss", number, 0, self.division.stages - 1)
            self.losses[number] = self.mail.receive(message)
        return self.losses[number]

    def tensors_for_backward(self, index: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Wait for the errors of a micro-batch."""
        number = self._batch.number - self.delay
        forward = self._passes.pop((number, index), None)
        if forward is None:
            return [], [], []
        self._started = time.perf_counter()
        errors = self._errors(number, index)
        self._event("wait", index, self._started)
        tensors, grads = forward.backward_pairs(errors)
        if self.last and forward.output.requires_grad:
            tensors.append(forward.output)
            grads.append(torch.ones_like(forward.output))
        self.module.part.number = (*self.seed, number, index)
        self._started = time.perf_counter()
        wanted = [forward.received] if self.gives_gradient and forward.received is not None else []
        return tensors, grads, wanted

    def _errors(self, number: int, index: int) -> Mapping[str, Tensor]:
        errors = {s.name: self._error(s, number, index) for s in self.awaited}
        if self.takes_gradient:
            message = self._message("gradient", number, index, self.stage + 1)
            errors[BOUNDARY] = self.mail.receive(message)
            self._check(errors[BOUNDARY], "the gradient from the stage above")
        return errors

    def _error(self, source: Source, number: int, index: int) -> Tensor:
        peer = self.division.routes.source_stage[source.name]
        name = self.numbers[source.name]
        error = self.mail.receive(self._message("error", number, index, peer, name))
        self._check(error, f"the error of {source.name!r}")
        return error

    def after_backward(self, index: int, grads: tuple[Tensor | None, ...]) -> None:
        """Send the gradient of what was received, where the boundary is not cut."""
        number = self._batch.number - self.delay
        self._ended = index + 1
        self._event("backward", index, getattr(self, "_started", time.perf_counter()))
        late = self._batches.get(number)
        if not self.gives_gradient or late is None or index >= len(late.sizes):
            return
        grad = grads[0] if grads else None
        shape, dtype = self._kind(self.division.cut[self.stage - 1])
        if grad is None:
            rows = late.sizes[index]
            grad = torch.zeros((rows, *shape), dtype=dtype, device=self.device)
        self.mail.send(self._message("gradient", number, index, self.stage - 1), grad)

    def end(self) -> None:
        """Let the messages go out, and raise if a number was not finite, as every rank will."""
        number = self._batch.number
        self._batches.pop(number - self.delay, None)
        if self._bad:
            self.mail.settle()
            raise DivergenceError(
                f"step {number}: {self._bad} is not finite, so this step updates nothing, on any rank. Use smaller "
                "rates, or look for the first loss that grows."
            )

    def _check(self, tensor: Tensor, what: str) -> None:
        if not self._bad and not bool(torch.isfinite(tensor).all()):
            self._bad = what

    def _timed(self, what: str, index: int, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        self._event(what, index, start)
        return result

    def _event(self, what: str, index: int, start: float) -> None:
        if self.trace is not None:
            self.trace.append((what, self._batch.number, index, start, time.perf_counter()))


class Loss:
    """The loss of a step, known on the last rank at once and on the others a little later.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.DFA(), example=x)
        >>> pipe = fb.parallel.pipeline(learner, x)  # a single process is a pipeline of one rank
        >>> loss = pipe.backward(x, nn.functional.cross_entropy, y)
        >>> loss.item() == float(loss)
        True
    """

    def __init__(self, steps: Steps, number: int) -> None:
        self._steps, self._number = steps, number

    def item(self) -> float:
        """The number; waits for the last rank to have it."""
        return float(self._steps.loss(self._number))

    __float__ = item

    def __repr__(self) -> str:
        return f"Loss of step {self._number}"
