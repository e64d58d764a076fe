"""Pooled feedback: a signal that is constant over space, or over patches of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from feedbackward.errors import AttachError
from feedbackward.operators.base import Operator, Shape, Weights, widened
from feedbackward.operators.dense import INITS, draw, outer, rows
from feedbackward.operators.options import check_count, check_init, check_scale


@dataclass(frozen=True)
class Pooled(Operator):
    r"""One weight per patch of a map `[c, H, ...]` with one to three spatial dimensions: `B: [C, c, ceil(H / size), ...]`.

    .. math:: \delta h_{m, i, y} = \sum_c d_{mc} B_{c, i, \lfloor y / \mathrm{size} \rfloor}

    If `B` is learned, the weight of a patch gets the sum of the dense gradient over the patch, :math:`d^\top \sum_{y} h_{i, y}`.

    size: the side of the patches; those at the far border may be smaller. With None one patch covers the whole space.
    init: one of :class:`Dense`'s, with n the number of all features of the site. The entries of the dense `B` that it stands
        for then have Dense's variance, and the signal has Dense's norm.
    scale: a factor on the initial weights.

    The first dimension of the site is taken for channels, so this operator does not fit tokens `[T, D]` that a source without
    tokens feeds.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 1, 6, 6), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
        >>> rule = fb.DKP(operator=fb.Pooled(size=2))
        >>> learner = fb.attach(model, rule, example=x, sites=["1"])
        >>> nn.functional.cross_entropy(learner(x), y).backward()
        >>> [tuple(B.grad.shape) for B in learner.feedback.parameters()]  # 2 x 2 patches of a 4 x 4 map
        [(3, 4, 2, 2)]
    """

    size: int | None = None
    init: str = "kaiming_uniform"
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.size is not None:
            check_count("size", self.size)
        check_init(self.init, INITS)
        check_scale(self.scale)
        object.__setattr__(
            self, "sized", self.size is not None
        )  # one patch fits a space of any size

    def fit(self, source: Shape, site: Shape, seed: int) -> Operator:
        if len(site) < 2:
            raise AttachError(
                f"Pooled feedback is constant over space, and an activity of shape {list(site)} has none: use "
                "fb.PerShape(maps=fb.Pooled(...), vectors=fb.Dense())."
            )
        return self

    def create(self, source: Shape, site: Shape, generator: torch.Generator) -> Weights:
        shape = (math.prod(source), site[0], *self._patches(site))
        return (draw(self.init, shape, math.prod(site), generator).mul_(self.scale),)

    def gram(self, weights: Weights, source: Shape, site: Shape) -> Tensor:
        # a patch counts as often as it has places; the matrix that the patches stand for may be too large to make
        B = widened(weights[0])
        places = self._sums(B.new_ones(1, 1, *site[1:]))
        return rows(B * places) @ rows(B).t()

    def gram_macs(self, source: Shape, site: Shape) -> int:
        return math.prod(source) * self.macs(source, site)

    def send(self, weights: Weights, d: Tensor, site: Shape) -> Tensor:
        (B,) = weights
        signal = (rows(d) @ rows(B)).reshape(len(d), *B.shape[1:])
        if self.size is None:
            return signal.expand(len(d), *site)
        for axis, length in enumerate(site[1:], 2):
            signal = signal.repeat_interleave(self.size, axis).narrow(axis, 0, length)
        return signal

    def correlate(self, weights: Weights, d: Tensor, h: Tensor, center: bool) -> Weights:
        B = weights[0]
        return (outer(rows(d), rows(self._sums(h)), center).reshape(B.shape),)

    def decay(self, weights: Weights, source: Shape, site: Shape) -> Weights:
        B = weights[0]
        return (B * self._sums(B.new_ones(1, 1, *site[1:])),)

    def macs(self, source: Shape, site: Shape) -> int:
        return math.prod(source) * site[0] * math.prod(self._patches(site))

    def bytes(self, source: Shape, site: Shape) -> int:
        return 4 * math.prod(source) * site[0] * math.prod(self._patches(site))

    def _patches(self, site: Shape) -> Shape:
        """The number of patches along each axis of space."""
        return tuple(1 if self.size is None else -(-length // self.size) for length in site[1:])

    def _sums(self, h: Tensor) -> Tensor:
        """The sum of `h: [M, c, *space]` over each patch, `[M, c, *patches]`: the adjoint of repeating."""
        if self.size is None:
            return h.sum(tuple(range(2, h.dim())), keepdim=True)
        for axis in range(2, h.dim()):
            patches = -(-h.shape[axis] // self.size)
            after = patches * self.size - h.shape[axis]
            h = F.pad(h, (*(0, 0) * (h.dim() - 1 - axis), 0, after))
            h = h.unflatten(axis, (patches, self.size)).sum(axis + 1)
        return h
