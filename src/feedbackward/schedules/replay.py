"""The `replay` schedule: joint gradients with the activities of about one segment in memory.

Where possible, the first pass records gradients from some site on, and trains the part above this site at once. That part
takes no more memory than the largest segment will need later. Only the part below is repeated. If segments interleave, or a
source lies below that site, the whole pass is repeated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from feedbackward.activity import LayerInput, Source
from feedbackward.engine.attached import Attached
from feedbackward.engine.cuts import Cuts
from feedbackward.engine.target import Target
from feedbackward.errors import AttachError
from feedbackward.model.example import copied, run
from feedbackward.model.state import PassState, preserved
from feedbackward.schedules.passes import (
    Deliver,
    Fingerprint,
    LossFn,
    finish,
    no_error,
    refuse_overlaps,
)
from feedbackward.schedules.preparation import prepared
from feedbackward.schedules.segmentwise import replay_kept


def replay(
    attached: Attached,
    inputs: Any,
    loss_fn: LossFn,
    target: Target | None,
    keep_inputs: bool = False,
) -> Tensor:
    """Forward and backward of a batch; returns the loss."""
    _refuse_replay(attached)
    refuse_overlaps(attached, "replay")
    preparation = prepared(attached, inputs)
    attached.begin_pass(inputs, target)
    if keep_inputs:
        return replay_kept(attached, inputs, loss_fn, target, preparation)
    if preparation.hold is None:
        return _repeat_all(attached, inputs, loss_fn, target)
    return _repeat_below(attached, inputs, loss_fn, target, preparation.hold)


def _repeat_below(
    attached: Attached, inputs: Any, loss_fn: LossFn, target: Target | None, hold: int
) -> Tensor:
    """Run a pass that trains the part above the site `hold`, and then a second pass up to that site."""
    cuts, model = attached.cuts, attached.model
    before = PassState(model)
    loss, errors, expected = _train_above(attached, inputs, loss_fn, target, hold)
    after = PassState(model)
    before.restore()
    visitor = Deliver(cuts, target, errors, (cuts.sites[hold].name, expected), until=hold)
    with cuts.visiting(visitor, target):
        run(model, copied(inputs))
    after.restore()
    return loss


def _train_above(
    attached: Attached, inputs: Any, loss_fn: LossFn, target: Target | None, hold: int
) -> tuple[Tensor, dict[str, Tensor], Fingerprint]:
    """The loss, the errors of the sources, and the fingerprint of the activity at the site `hold`."""
    with torch.no_grad(), attached.cuts.recording(target, hold=hold) as tape:
        output = run(attached.model, copied(inputs))
    torch.clear_autocast_cache()  # of weights that were cast without gradients
    assert tape.held is not None
    expected, tape.held = Fingerprint.of(tape.held), None
    return finish(loss_fn(output)), tape.errors, expected


def _repeat_all(attached: Attached, inputs: Any, loss_fn: LossFn, target: Target | None) -> Tensor:
    errors, expected = _find_errors(attached, inputs, loss_fn, target)
    visitor = Deliver(attached.cuts, target, errors, expected)
    with attached.cuts.visiting(visitor, target):
        output = run(attached.model, copied(inputs))
    return finish(loss_fn(output))


def _find_errors(
    attached: Attached, inputs: Any, loss_fn: LossFn, target: Target | None
) -> tuple[dict[str, Tensor], tuple[str, Fingerprint]]:
    """The error of every source, beginning with the last one, and the last source's fingerprint.

    A pass runs without gradients up to the source, and with gradients from there on. A source that is also a site needs
    no pass, because its error is the signal that it gets.
    """
    cuts, errors = attached.cuts, dict[str, Tensor]()
    order = {source.name: source for source in cuts.sources}
    expected: tuple[str, Fingerprint] | None = None
    stand_ins: dict[int, Tensor] = {}
    for name in reversed(attached.plan.sources):
        relay = cuts.site_of(order[name])
        if relay is not None and expected is not None:
            errors[name] = _sent(cuts, relay, stand_ins[relay], errors, target)
            continue
        seek = Seek(cuts, name, target, errors, stand_ins)
        with preserved(attached.model), torch.no_grad():
            with cuts.visiting(seek, target):
                output = run(attached.model, copied(inputs))
            seek.add(loss_fn(output), None)
        # it has weights that were cast without gradients
        torch.clear_autocast_cache()
        errors[name] = seek.error()
        if expected is None:
            expected = seek.fingerprint()
    assert expected is not None
    return errors, expected


def _sent(
    cuts: Cuts, index: int, like: Tensor, errors: dict[str, Tensor], target: Target | None
) -> Tensor:
    """The signal that a site gets from the errors of its sources."""
    h = like.requires_grad_()
    total = torch.zeros_like(h)
    for edge in cuts.edges_to[index]:
        d = errors[edge.source.name]
        sent = cuts.broadcast(torch.zeros_like(d), [edge], [h], target, learn=False)
        total += torch.autograd.grad(sent, h, d)[0]
    return total


class Seek:
    """Finds the error of one source. Gradients are on from the source to the next cuts, whose signals are known."""

    def __init__(
        self,
        cuts: Cuts,
        name: str,
        target: Target | None,
        errors: dict[str, Tensor],
        stand_ins: dict[int, Tensor],
    ) -> None:
        self.cuts, self.name, self.target = cuts, name, target
        self.errors, self.stand_ins = errors, stand_ins
        self.relays = {cuts.site_of(source) for source in cuts.sources}
        self.source: Tensor | None = None
        self.sum: Tensor | None = None

    def at_site(self, index: int, h: Tensor, version: int) -> None:
        if index in self.relays:
            # its shape, without its memory
            self.stand_ins[index] = h.new_zeros(()).expand_as(h)
        if self.source is None or not h.requires_grad:
            return
        for edge in self.cuts.edges_to[index]:
            d = self.errors[edge.source.name]
            sent = self.cuts.broadcast(torch.zeros_like(d), [edge], [h], self.target, learn=False)
            self.add(sent, d, more=True)

    def at_source(self, source: Source, tensor: Tensor) -> Tensor:
        if source.name == self.name:
            torch.set_grad_enabled(True)
            self.source = tensor.detach().requires_grad_()
            # an in-place operation may follow
            return self.source.clone()
        return tensor

    def add(self, output: Tensor, d: Tensor | None, more: bool = False) -> None:
        """Add the contribution of an output with the gradient `d` (None for a loss) to the source's error."""
        if not output.requires_grad or self.source is None:
            return
        with torch.enable_grad(), torch.autocast(output.device.type, enabled=False):
            (part,) = torch.autograd.grad(
                output, self.source, d, retain_graph=more, allow_unused=True
            )
        if part is not None:
            self.sum = part if self.sum is None else self.sum + part

    def fingerprint(self) -> tuple[str, Fingerprint]:
        assert self.source is not None
        return self.name, Fingerprint.of(self.source)

    def error(self) -> Tensor:
        if self.sum is None:
            raise no_error(self.name)
        return self.sum


def _refuse_replay(attached: Attached) -> None:
    rule = attached.rule
    if issubclass(rule.feeds, LayerInput):
        raise AttachError(
            f"{rule.label} is a chain: each layer waits for the error of the one above, so its segments cannot be replayed one by "
            'one. Use schedule="joint", or a rule with direct feedback (DFA, DKP).'
        )
    if attached.graph.upward:
        raise AttachError(
            f"{rule.label}'s signals go up from segment to segment while the whole forward pass is kept, so its segments cannot be "
            'replayed one by one. Use schedule="joint", or a rule with direct feedback (DFA, DKP).'
        )
    if any(each.sends_activity for each in attached.rules):
        raise AttachError(
            f'{rule.label} sends the source\'s activity along with its target, which replay does not keep: use schedule="joint".'
        )
    if not attached.needs_error:
        raise AttachError(
            f'{rule.label} needs no error, so nothing must be replayed: use schedule="eager".'
        )
    if not attached.graph.edges:
        raise AttachError(
            f"{rule.label} cuts nothing, so there are no segments to replay: torch.utils.checkpoint saves memory with backprop."
        )
