"""Kernel feedback: a convolution kernel of its own for maps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from feedbackward.errors import AttachError
from feedbackward.operators.base import Operator, Shape, Weights
from feedbackward.operators.dense import INITS, draw
from feedbackward.operators.layer import LayerForm, LayerShaped
from feedbackward.operators.options import check_count, check_init, check_scale


@dataclass(frozen=True)
class Kernel(Operator):
    r"""A kernel `B: [C, c / groups, k, ...]` for a site `[c, H, ...]`; the signal is a transposed convolution of the error.

    .. math:: \delta h_{m, i, y} = \sum_{c, t, y'} d_{m, c, y'}\, B_{c, i, t}
       \quad\text{over}\quad y = \mathrm{stride}\; y' + \mathrm{dilation}\, (t - \lfloor k / 2 \rfloor)

    For a source that is a map `[C, H2, ...]`, H = stride * H2 along each axis, and the sum is over the places y' and weights t
    that lead to y. For a vector `[C]`, such as the logits, the error is a constant map over the site's own space, with stride 1.
    This is the feedback of BioTorch, constant over space except at the borders. If `B` is learned, it gets the weight
    gradient of the convolution from `h` to the source; `center` subtracts each channel's mean over M and space.

    size: k along each axis, odd. If the stride is above dilation * k, some places of the site get no signal.
    dilation, groups: those of the kernel.
    init: one of :class:`Dense`'s, with n the number of weights that an error unit passes through (for a vector k^dims times
        the features of the site, over groups). The signal then has the norm of Dense's, except for the borders.
    scale: a factor on the initial weights.

    Han, Park, Ryu & Yoo 2020 (arXiv:2006.12830) send errors back through dilated and grouped kernels; Sanfiz & Akrout 2021
    (arXiv:2108.13446), BioTorch, from the logits.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 1, 6, 6), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
        >>> rule = fb.DKP(operator=fb.operators.Kernel(3))
        >>> learner = fb.attach(model, rule, example=x, sites=["1"])
        >>> nn.functional.cross_entropy(learner(x), y).backward()
        >>> [tuple(B.grad.shape) for B in learner.feedback.parameters()]
        [(3, 4, 3, 3)]
    """

    sized = False

    size: int = 3
    dilation: int = 1
    groups: int = 1
    init: str = "kaiming_uniform"
    scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("size", "dilation", "groups"):
            check_count(name, getattr(self, name))
        if self.size % 2 == 0:
            raise AttachError(
                f"size={self.size}: a kernel is centred on a place, so give an odd size."
            )
        check_init(self.init, INITS)
        check_scale(self.scale)

    def fit(self, source: Shape, site: Shape, seed: int) -> Operator:
        if len(site) < 2:
            raise AttachError(
                f"Kernel feedback runs over space, and an activity of shape {list(site)} has none: use "
                "fb.PerShape(maps=fb.operators.Kernel(...), vectors=fb.Dense())."
            )
        if len(source) not in (1, len(site)) or len(site) > 4:
            raise AttachError(
                f"Kernel feedback leads from a map or a vector to a map of one to three dimensions of space, not from a source of "
                f"shape {list(source)} to an activity of shape {list(site)}. Use Dense or Pooled feedback there."
            )
        if source[0] % self.groups or site[0] % self.groups:
            raise AttachError(
                f"groups={self.groups} does not divide both the {source[0]} channels of the source and the {site[0]} of the site. "
                "Choose a common divisor, or groups=1."
            )
        self._strides(source, site)
        return self

    def create(self, source: Shape, site: Shape, generator: torch.Generator) -> Weights:
        shape = self._shape(source, site)
        width = math.prod(shape[1:]) * (1 if len(source) > 1 else math.prod(site[1:]))
        return (draw(self.init, shape, width, generator).mul_(self.scale),)

    def send(self, weights: Weights, d: Tensor, site: Shape) -> Tensor:
        (B,) = weights
        if d.dim() > 2:
            return self._layer(tuple(d.shape[1:]), site).send(weights, d, site)
        # what reaches a place from a constant map: for each weight of the kernel, 0 or the error
        sums = torch.einsum("mgo,gok->mgk", d.unflatten(1, (self.groups, -1)), self._grouped(B))
        return (sums.reshape(len(d), site[0], -1) @ self._reach(site, d)).reshape(len(d), *site)

    def correlate(self, weights: Weights, d: Tensor, h: Tensor, center: bool) -> Weights:
        B, site = weights[0], tuple(h.shape[1:])
        if d.dim() > 2:
            return self._layer(tuple(d.shape[1:]), site).correlate(weights, d, h, center)
        if center:
            h = h - h.mean([0, *range(2, h.dim())], keepdim=True)
        sums = (h.flatten(2) @ self._reach(site, h).t()).reshape(len(h), self.groups, -1)
        grad = torch.einsum("mgo,mgk->gok", d.unflatten(1, (self.groups, -1)), sums)
        return (grad.reshape(B.shape),)

    def decay(self, weights: Weights, source: Shape, site: Shape) -> Weights:
        (B,) = weights
        if len(source) == 1:
            reach = self._reach(site, B)
            return ((B.flatten(2) @ reach @ reach.t()).reshape(B.shape),)
        counts = B.new_ones(1)  # of the places that a weight leads to
        for length, places, stride in zip(
            site[1:], source[1:], self._strides(source, site), strict=True
        ):
            counts = torch.kron(counts, self._within(length, places, stride, B).sum(1))
        return (B * counts.reshape(B.shape[2:]),)

    def macs(self, source: Shape, site: Shape) -> int:
        weights = math.prod(self._shape(source, site))
        if len(source) > 1:
            return weights * math.prod(source[1:])
        return weights + self.size ** (len(site) - 1) * math.prod(site)

    def bytes(self, source: Shape, site: Shape) -> int:
        return 4 * math.prod(self._shape(source, site))

    def _shape(self, source: Shape, site: Shape) -> Shape:
        return (source[0], site[0] // self.groups, *[self.size] * (len(site) - 1))

    def _strides(self, source: Shape, site: Shape) -> Shape:
        space = source[1:] or site[1:]
        if any(length % places for length, places in zip(site[1:], space, strict=True)):
            raise AttachError(
                f"Kernel feedback from a source of shape {list(source)} to an activity of shape {list(site)}: no whole stride "
                f"leads from {list(space)} to {list(site[1:])}. Each side must be a multiple of the source's: use Dense or Pooled "
                "feedback there."
            )
        return tuple(length // places for length, places in zip(site[1:], space, strict=True))

    def _layer(self, source: Shape, site: Shape) -> LayerShaped:
        """The feedback of the convolution from the site to the source."""
        dims = len(site) - 1
        padding = self.dilation * (self.size // 2)
        form = LayerForm(
            self._shape(source, site),
            self._strides(source, site),
            (self.dilation,) * dims,
            self.groups,
            padding=(padding,) * dims,
        )
        return LayerShaped(form)

    def _grouped(self, B: Tensor) -> Tensor:
        """[groups, C / groups, (c / groups) k^dims]."""
        return B.reshape(self.groups, len(B) // self.groups, -1)

    def _reach(self, site: Shape, like: Tensor) -> Tensor:
        """[k^dims, space], 1 where a weight leads to a place of the site from within its space, else 0."""
        reach = like.new_ones(1, 1)
        for length in site[1:]:
            # seen from the source, the last weight leads as far forward as, seen from the site, the first one does
            reach = torch.kron(reach, self._within(length, length, 1, like).flip(0))
        return reach

    def _within(self, length: int, places: int, stride: int, like: Tensor) -> Tensor:
        """[k, places], 1 where a weight leads from a place of the source into the site, along one axis; else 0."""
        steps = (torch.arange(self.size, device=like.device) - self.size // 2) * self.dilation
        target = torch.arange(places, device=like.device) * stride + steps.unsqueeze(1)
        return ((target >= 0) & (target < length)).to(like.dtype)
