"""What the schedules other than `joint` share: a pass that runs the backward pass of each segment at its site."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from feedbackward.activity import Source
from feedbackward.engine.attached import Attached
from feedbackward.engine.cuts import Cuts
from feedbackward.engine.hooks import PassOverError
from feedbackward.engine.target import Target
from feedbackward.errors import AttachError, SiteError

LossFn = Callable[[Any], Tensor]


def _same(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Fingerprint:
    """A few numbers that tell one activity from another: its shape, its mean magnitude, and a weighted mean."""

    shape: tuple[int, ...]
    magnitude: float
    weighted: float

    @staticmethod
    def of(h: Tensor) -> Fingerprint:
        """The fingerprint of an activity. It waits for the device once."""
        # a fake tensor has a shape only
        if h.untyped_storage().device.type == "meta":
            return Fingerprint(tuple(h.shape), 0.0, 0.0)
        h = h.detach()
        last = h.shape[-1] if h.dim() else 1
        weights = torch.linspace(0.5, 1.5, last, device=h.device, dtype=h.dtype)
        numbers = torch.stack(
            [h.abs().mean(dtype=torch.float32), (h * weights).mean(dtype=torch.float32)]
        )
        magnitude, weighted = numbers.tolist()
        return Fingerprint(tuple(h.shape), magnitude, weighted)

    def like(self, other: Fingerprint | None) -> bool:
        """Whether both belong to the same activity, up to the rounding of kernels that add in any order."""
        if other is None or self.shape != other.shape:
            return False
        pairs = ((self.magnitude, other.magnitude), (self.weighted, other.weighted))
        room = 1e-4 * max(1e-6, abs(self.magnitude))
        return all(abs(a - b) <= room or a != a for a, b in pairs)


class Deliver:
    """Runs the backward pass of each segment as soon as the forward pass reaches its site.

    errors: those of the sources; empty if none is needed.
    expected: the name of an activity or source, and the fingerprint that it must have.
    until: the number of the last site that is wanted; the pass ends there.
    """

    def __init__(
        self,
        cuts: Cuts,
        target: Target | None,
        errors: dict[str, Tensor],
        expected: tuple[str, Fingerprint] | None = None,
        until: int | None = None,
    ) -> None:
        self.cuts, self.target, self.errors = cuts, target, errors
        self.expected, self.until = expected, until

    def at_site(self, index: int, h: Tensor, version: int) -> None:
        self._compare(self.cuts.sites[index].name, h)
        # a segment with nothing to train gets no signal
        if h.requires_grad:
            self._send(index, h, version)
        if index == self.until:
            raise PassOverError

    def _send(self, index: int, h: Tensor, version: int) -> None:
        outputs, grads = [], []
        # the site may lie in a checkpoint, whose hooks must not apply here
        with torch.autograd.graph.saved_tensors_hooks(_same, _same):
            for edge in self.cuts.edges_to[index]:
                d = self._error(edge.source, h)
                self.cuts.check(edge, h, version, d)
                outputs.append(self.cuts.broadcast(torch.zeros_like(d), [edge], [h], self.target))
                grads.append(d)
            tape = self.cuts.tape
            if index in self.cuts.local and tape is not None and tape.target is not None:
                loss = self.cuts.local_loss(self.cuts.local[index], h, tape)
                outputs.append(loss)
                grads.append(torch.ones_like(loss))
        if outputs:
            with self.cuts.paused(), torch.autocast(h.device.type, enabled=False):
                torch.autograd.backward(outputs, grads)

    def at_source(self, source: Source, tensor: Tensor) -> Tensor:
        self._compare(source.name, tensor)
        # its own error comes from above, as in any backward pass
        return tensor

    def _compare(self, name: str, now: Tensor) -> None:
        if (
            self.expected is None
            or self.expected[0] != name
            or self.expected[1].like(Fingerprint.of(now))
        ):
            return
        raise SiteError(
            f"the repeated forward pass gave another {name!r} than the first, so the gradients of this step mix two networks: "
            "zero them. Randomness must come from torch's generators and a forward must not depend on what earlier ones did; or "
            'use schedule="joint".'
        )

    def _error(self, source: Source, h: Tensor) -> Tensor:
        if source.name in self.errors:
            return self.errors[source.name]
        if self.target is None:
            raise no_error(source.name)
        return h.new_zeros(1).expand(len(self.target.raw), *source.shape)


def no_error(name: str) -> SiteError:
    """The error for a source that gets no error signal."""
    return SiteError(
        f"the loss does not depend on the source {name!r}, so there is no error to send: return the model's "
        "predictions from it, or choose another error_at."
    )


def finish(loss: Tensor) -> Tensor:
    """Train what lies above the last cuts, unless it is frozen."""
    if loss.requires_grad:
        with torch.autocast(loss.device.type, enabled=False):
            loss.backward()
    return loss.detach()


def refuse_overlaps(attached: Attached, schedule: str) -> None:
    many = attached.graph.repeated
    if many:
        raise AttachError(
            f'schedule="{schedule}" runs each segment\'s backward by itself, and the calls of {many[0].name!r} are one site. Give the '
            "sequence in pieces instead, with the state detached between them: memory is then that of a piece, and gradients add up."
        )
    for first, second in attached.plan.overlaps:
        raise AttachError(
            f'schedule="{schedule}" runs each segment\'s backward by itself, but the segments of {first!r} and {second!r} overlap: '
            "an activity leads to both round the cuts between them. Cut the trunk that they share "
            '(sites="blocks", or name its module as a site), or use schedule="joint", where signals add up.'
        )
