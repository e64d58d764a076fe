r"""Schedules: when the backward of each segment runs. A schedule is not a rule; it changes no gradient.

F is the work of the forward pass, G of the weight gradients, D of the input gradients; backprop does F + G + D.

joint: one backward over all segments after the forward pass. Holds every segment's activities. F + G.
eager: a segment's backward runs within the forward pass, as soon as its site is met. Holds one segment. F + G. For rules
    whose signals need no error (DRTP, DGL, Frozen).
replay: a forward pass without gradients gives the error; then the forward pass is repeated, eagerly. Holds one segment. 2F + G.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .errors import AttachError, SiteError
from .graph import Arc, Source
from .repeatable import refuse_unrepeatable
from .seams import Seams
from .target import Target
from .trace import preserved, run

if TYPE_CHECKING:
    from .learner import Learner

Schedule = Literal["joint", "replay", "eager"]
LossFn = Callable[[Any], Tensor]


def backward(learner: Learner, inputs: Any, loss_fn: LossFn, schedule: Schedule) -> Tensor:
    """Forward and backward by a schedule; see `Learner.backward`."""
    ways: dict[str, Callable[[Learner, Any, LossFn], Tensor]] = {
        "joint": _joint,
        "replay": _replay,
        "eager": _eager,
    }
    if schedule not in ways:
        raise AttachError(f"unknown schedule {schedule!r}: choose one of {', '.join(ways)}.")
    if not torch.is_grad_enabled():
        raise AttachError("learner.backward computes gradients: call it outside torch.no_grad().")
    return ways[schedule](learner, inputs, loss_fn)


def step_in_backward(
    parameters: Iterable[nn.Parameter], make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
) -> list[RemovableHandle]:
    """Update each parameter as soon as its gradient is there, and drop the gradient: they are never all held.

    `make` builds the optimizer of one parameter, for example `lambda p: torch.optim.SGD(p, lr=0.1)`. Under `eager` and
    `replay` a segment is then updated before the next one runs. Call `zero_grad` and `step` nowhere else; gradients cannot
    be accumulated or clipped together. A parameter of several segments (tied weights, `Shared` feedback) is updated once
    for each. Remove the returned handles to end it.
    """

    def hook(optimizer: torch.optim.Optimizer) -> Callable[[Tensor], None]:
        def update(parameter: Tensor) -> None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return update

    return [p.register_post_accumulate_grad_hook(hook(make([p]))) for p in parameters if p.requires_grad]


def _joint(learner: Learner, inputs: Any, loss_fn: LossFn) -> Tensor:
    loss = loss_fn(run(learner, inputs))
    loss.backward()
    return loss.detach()


def _eager(learner: Learner, inputs: Any, loss_fn: LossFn) -> Tensor:
    if learner.rule.needs_error:
        raise AttachError(
            f"{learner.rule.label}'s signals are made from the output's error, which is known after the forward pass only: use "
            'schedule="replay", or a rule that needs no error (DRTP, DGL).'
        )
    _refuse_overlaps(learner, "eager")
    target = learner.begin_pass(inputs)
    with learner.seams.sweeping(Deliver(learner.seams, target, {}), target):
        output = run(learner.model, inputs)
    return _finish(loss_fn(output))


def _replay(learner: Learner, inputs: Any, loss_fn: LossFn) -> Tensor:
    _refuse_replay(learner)
    _refuse_overlaps(learner, "replay")
    refuse_unrepeatable(learner, inputs)
    target = learner.begin_pass(inputs)
    errors, expected = _find_errors(learner, inputs, loss_fn, target)
    sweep = Deliver(learner.seams, target, errors, expected)
    with learner.seams.sweeping(sweep, target):
        output = run(learner.model, inputs)
    return _finish(loss_fn(output))


def _finish(loss: Tensor) -> Tensor:
    """Train what lies above the last cuts, unless it is frozen."""
    if loss.requires_grad:
        loss.backward()
    return loss.detach()


def _find_errors(
    learner: Learner, inputs: Any, loss_fn: LossFn, target: Target | None
) -> tuple[dict[str, Tensor], tuple[str, Tensor]]:
    """The error of every source, the last source first; and the last source's name and value, as passes found it.

    A pass runs without gradients up to the source, and with them from there on. A source that is a site as well
    needs no pass: its error is the signal it is sent.
    """
    seams, errors = learner.seams, dict[str, Tensor]()
    order = {source.name: source for source in seams.sources}
    expected: tuple[str, Tensor] | None = None
    shapes: dict[int, Tensor] = {}
    for name in reversed(learner.plan.sources):
        relay = seams.site_of(order[name])
        if relay is not None and expected is not None:
            errors[name] = _sent(seams, relay, shapes[relay], errors, target)
            continue
        seek = Seek(seams, name, target, errors, shapes)
        with preserved(learner.model), torch.no_grad():
            with seams.sweeping(seek, target):
                output = run(learner.model, inputs)
            seek.add(loss_fn(output), None)
        torch.clear_autocast_cache()  # of weights that were cast without gradients
        errors[name] = seek.error()
        if expected is None:
            expected = (name, seek.value())
    assert expected is not None
    return errors, expected


def _sent(seams: Seams, index: int, like: Tensor, errors: dict[str, Tensor], target: Target | None) -> Tensor:
    """What a site is sent, given the errors of its sources."""
    h = like.requires_grad_()
    total = torch.zeros_like(h)
    for edge in seams.edges_to[index]:
        d = errors[edge.source.name]
        sent = seams.broadcast(torch.zeros_like(d), [edge], [h], target, learn=False)
        total += torch.autograd.grad(sent, h, d)[0]
    return total


class Deliver:
    """Runs the backward of each segment as soon as its site is met. `errors`: of the sources, empty where none is needed.

    `expected`: the last source's name and the value that it must have again.
    """

    def __init__(
        self,
        seams: Seams,
        target: Target | None,
        errors: dict[str, Tensor],
        expected: tuple[str, Tensor] | None = None,
    ) -> None:
        self.seams, self.target, self.errors, self.expected = seams, target, errors, expected

    def met(self, index: int, h: Tensor, version: int) -> None:
        if not h.requires_grad:  # a segment with nothing to train gets no signal
            return
        outputs, grads = [], []
        for edge in self.seams.edges_to[index]:
            d = self._error(edge.source, h)
            self.seams.check(edge, h, version, d)
            outputs.append(self.seams.broadcast(torch.zeros_like(d), [edge], [h], self.target))
            grads.append(d)
        if index in self.seams.local and self.target is not None:
            loss = self.seams.local_loss(self.seams.local[index], h, self.target)
            outputs.append(loss)
            grads.append(torch.ones_like(loss))
        if outputs:
            with self.seams.paused(), torch.autocast(h.device.type, enabled=False):
                torch.autograd.backward(outputs, grads)

    def fired(self, source: Source, tensor: Tensor) -> Tensor:
        if self.expected is not None and self.expected[0] == source.name:
            _refuse_change(source, self.expected[1], tensor)
        return tensor  # its own error comes from above, as in any backward pass

    def _error(self, source: Source, h: Tensor) -> Tensor:
        if source.name in self.errors:
            return self.errors[source.name]
        assert self.target is not None
        return h.new_zeros(1).expand(len(self.target.raw), *source.shape)


class Seek:
    """Finds the error of one source: gradients are on from the source to the next cuts, whose signals are known."""

    def __init__(
        self,
        seams: Seams,
        name: str,
        target: Target | None,
        errors: dict[str, Tensor],
        shapes: dict[int, Tensor],
    ) -> None:
        self.seams, self.name, self.target, self.errors, self.shapes = seams, name, target, errors, shapes
        self.relays = {seams.site_of(source) for source in seams.sources}
        self.source: Tensor | None = None
        self.sum: Tensor | None = None

    def met(self, index: int, h: Tensor, version: int) -> None:
        if index in self.relays:
            self.shapes[index] = torch.zeros_like(h, requires_grad=False)
        if self.source is None or not h.requires_grad:
            return
        for edge in self.seams.edges_to[index]:
            d = self.errors[edge.source.name]
            sent = self.seams.broadcast(torch.zeros_like(d), [edge], [h], self.target, learn=False)
            self.add(sent, d, more=True)

    def fired(self, source: Source, tensor: Tensor) -> Tensor:
        if source.name == self.name:
            torch.set_grad_enabled(True)
            self.source = tensor.detach().requires_grad_()
            return self.source.clone()  # an in-place operation may follow
        return tensor

    def add(self, output: Tensor, d: Tensor | None, more: bool = False) -> None:
        """Add what an output with the gradient `d` (None for a loss) contributes to the source's error."""
        if not output.requires_grad or self.source is None:
            return
        with torch.enable_grad(), torch.autocast(output.device.type, enabled=False):
            (part,) = torch.autograd.grad(output, self.source, d, retain_graph=more, allow_unused=True)
        if part is not None:
            self.sum = part if self.sum is None else self.sum + part

    def value(self) -> Tensor:
        assert self.source is not None
        return self.source.detach()

    def error(self) -> Tensor:
        if self.sum is None:
            raise SiteError(
                f"the loss does not depend on the source {self.name!r}, so there is no error to send: return the model's "
                "predictions from it, or choose another error_at."
            )
        return self.sum


def _refuse_replay(learner: Learner) -> None:
    rule = learner.rule
    if issubclass(rule.feeds, Arc):
        raise AttachError(
            f"{rule.label} is a chain: each layer waits for the error of the one above, so its segments cannot be replayed one by "
            'one. Use schedule="joint", or a rule with direct feedback (DFA, DKP).'
        )
    if rule.sends_activity:
        raise AttachError(
            f'{rule.label} sends the source\'s activity along with its target, which replay does not keep: use schedule="joint".'
        )
    if not rule.needs_error:
        raise AttachError(f'{rule.label} needs no error, so nothing must be replayed: use schedule="eager".')
    if not learner.graph.edges:
        raise AttachError(
            f"{rule.label} cuts nothing, so there are no segments to replay: torch.utils.checkpoint saves memory with backprop."
        )


def _refuse_overlaps(learner: Learner, schedule: str) -> None:
    if learner.plan.overlaps:
        first, second = learner.plan.overlaps[0]
        raise AttachError(
            f'schedule="{schedule}" runs each segment\'s backward by itself, but the segments of {first!r} and {second!r} overlap: '
            "an activity leads to both round the cuts between them. Cut the trunk that they share "
            '(sites="blocks", or name its module as a site), or use schedule="joint", where signals add up.'
        )


def _refuse_change(source: Source, before: Tensor, now: Tensor) -> None:
    if before.shape == now.shape and torch.allclose(
        before, now.detach(), rtol=1e-2, atol=1e-3, equal_nan=True
    ):
        return
    raise SiteError(
        f"the second forward pass gave another {source.name!r} than the first, so the gradients of this step mix two networks: "
        "zero them. Randomness must come from torch's generators and a forward must not depend on what earlier ones did; or use "
        'schedule="joint".'
    )
