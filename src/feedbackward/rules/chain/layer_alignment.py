r"""The primitives of Kunin et al. 2020: regularisers of a layer's feedback weights, and rules that are sums of them.

For a layer with input `x`, forward weight `W` and feedback weight `B` of the same shape,

.. math:: p = x W^\top, \qquad q = x B^\top, \qquad r = p\,B

A convolution uses its own forward product, and the adjoint of it for `r`. A primitive `P(W, B, x)` is a number. Each function
here returns its gradient with respect to `B`, for constant `W` and `x`. E is the mean over the batch and the output's tokens or
positions; the authors' code sums over positions.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from feedbackward.activity import LayerInput, Site, Source
from feedbackward.graph import Edge, Graph
from feedbackward.operators.base import Weights
from feedbackward.operators.layer import LayerShaped
from feedbackward.rule import Rule
from feedbackward.topologies import chain


@dataclass(frozen=True)
class Seen:
    """What is known at one layer. `x: [M, *site]`."""

    layer: LayerShaped
    W: Tensor
    B: Tensor
    x: Tensor
    # a cached_property holds a lock, which no compiler can see through
    _kept: list[Tensor] = field(default_factory=list)

    @property
    def p(self) -> Tensor:
        if not self._kept:
            self._kept.append(self.layer.project(self.W, self.x))
        return self._kept[0]

    @property
    def q(self) -> Tensor:
        return self.layer.project(self.B, self.x)

    @property
    def r(self) -> Tensor:
        return self.layer.send((self.B,), self.p, tuple(self.x.shape[1:]))

    def mean(self, d: Tensor, h: Tensor) -> Tensor:
        """The mean of the products of an output-shaped `d` and an input-shaped `h`, in the form of the weights."""
        (total,) = self.layer.correlate((self.B,), d, h, center=False)
        return total * (d.shape[1] / d.numel())


Primitive = Callable[[Seen], Tensor]


def decay(seen: Seen) -> Tensor:
    r""":math:`\|W\|^2 + \|B\|^2`."""
    return 2 * seen.B


def sparse(seen: Seen) -> Tensor:
    r""":math:`E\|p\|^2 + E\|q\|^2`."""
    return 2 * seen.mean(seen.q, seen.x)


def self_product(seen: Seen) -> Tensor:
    r"""The paper's "self": :math:`-\mathrm{tr}(B^\top W) = -\sum W \odot B`."""
    return -seen.W


def amp(seen: Seen) -> Tensor:
    r""":math:`-E\,\langle p, q\rangle`."""
    return -seen.mean(seen.p, seen.x)


def null(seen: Seen) -> Tensor:
    r""":math:`E\|r\|^2`."""
    return 2 * seen.mean(seen.p, seen.r)


def standardized(x: Tensor) -> Tensor:
    """`x: [M, features, ...]` without its mean over all but the features, and with a mean square of 1."""
    centred = x - x.mean([i for i in range(x.dim()) if i != 1], keepdim=True)
    return centred * centred.square().mean().clamp_min(torch.finfo(x.dtype).tiny).rsqrt()


@dataclass(frozen=True, kw_only=True)
class LayerAlignment(Rule):
    """A chain whose `B` descends a sum of primitives, in every backward pass.

    The regulariser does not come from the loss. A factor on the loss does not scale it, and with k accumulated batches it
    counts k times.

    init, scale: of the feedback weights, see :class:`LayerShaped`.
    """

    init: str = "like_weight"
    scale: float = 1.0

    feeds = LayerInput
    linear = False

    @property
    @abstractmethod
    def terms(self) -> Sequence[tuple[float, Primitive]]:
        """The primitives and their factors."""

    def prepared(self, x: Tensor, layer: LayerShaped) -> tuple[Tensor, float]:
        """The `x` that the primitives use, and a factor on their gradients."""
        return x, 1.0

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        return chain(
            sites,
            lambda layer_input: LayerShaped(layer_input.form, self.init, self.scale),
            with_forward_weight=True,
        )

    def feedback_grad(self, edge: Edge, weights: Weights, d: Tensor, h: Tensor) -> Weights:
        B, W = (w.to(h.dtype) for w in weights)
        assert isinstance(edge.operator, LayerShaped)
        # all products are in the activity's dtype
        with torch.autocast(h.device.type, enabled=False):
            x, rate = self.prepared(h, edge.operator)
            seen = Seen(edge.operator, W, B, x)
            return (
                torch.stack(
                    [rate * factor * primitive(seen) for factor, primitive in self.terms]
                ).sum(0),
            )


@dataclass(frozen=True, kw_only=True)
class ActivityAlignment(LayerAlignment):
    r"""Alignment by the layer's own activity.

    standardize: subtract the batch mean of every feature of `x`, and divide by the root mean square of the rest, one number
        for the layer. Also divide the gradient by n, the inputs of an output unit, because their total power is then n.
        Without it, the stable rate differs between layers by the largest eigenvalue of :math:`E\,x^\top x`.
    """

    standardize: bool = True

    @property
    def least_batch(self) -> int:
        return 2 if self.standardize else 1

    def prepared(self, x: Tensor, layer: LayerShaped) -> tuple[Tensor, float]:
        if not self.standardize:
            return x, 1.0
        form = layer.form
        outputs = form.shape[1] * form.groups if form.transposed else form.shape[0]
        return standardized(x), outputs / math.prod(form.shape)
