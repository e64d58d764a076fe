"""Layer-shaped feedback with the signs of the layer's own weight, `B = M * sign(W)`: one bit per weight is transported."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from feedbackward.operators.base import Operator, Shape, Weights
from feedbackward.operators.counter import new_state, uniform
from feedbackward.operators.layer import LayerShaped


@dataclass(frozen=True)
class Signed(Operator):
    """`B = M * sign(W)` for an edge that forward_weight `W`; where `W` is zero, so is `B`.

    layer: its form, and with `init` and `scale` the law U(-b, b) that the magnitudes are taken from.
    follow_norm: scale `B` in every pass to the Frobenius norm that `W` has: one more number per layer is transported.
    """

    sized = False
    learnable = 0

    layer: LayerShaped
    follow_norm: bool = False

    @abstractmethod
    def magnitudes(self, own: Weights, W: Tensor) -> Tensor | float:
        """M, of the shape of `W` or one number; `own` are the edge's own tensors."""

    def send(self, weights: Weights, d: Tensor, site: Shape) -> Tensor:
        *own, W = weights
        B = W.sign() * self.magnitudes(tuple(own), W)
        if self.follow_norm:
            B = B * (W.norm() / B.norm().clamp_min(torch.finfo(B.dtype).tiny))
        return self.layer.send((B,), d, site)

    def macs(self, source: Shape, site: Shape) -> int:
        return self.layer.macs(source, site)


@dataclass(frozen=True)
class UniformSigned(Signed):
    """One magnitude for the whole layer: the standard deviation b / sqrt(3) of the law. Stores nothing."""

    parts = ()

    def create(self, source: Shape, site: Shape, generator: torch.Generator) -> Weights:
        return ()

    def magnitudes(self, own: Weights, W: Tensor) -> float:
        return self.layer.bound / 3**0.5

    def bytes(self, source: Shape, site: Shape) -> int:
        return 0


@dataclass(frozen=True)
class FixedSigned(Signed):
    """Magnitudes `M = |U(-b, b)|` drawn once."""

    parts = ("M",)

    def create(self, source: Shape, site: Shape, generator: torch.Generator) -> Weights:
        return (self.layer.create(source, site, generator)[0].abs(),)

    def magnitudes(self, own: Weights, W: Tensor) -> Tensor:
        return own[0]

    def bytes(self, source: Shape, site: Shape) -> int:
        return self.layer.bytes(source, site)


@dataclass(frozen=True)
class FreshSigned(Signed):
    """Magnitudes `M = |U(-b, b)|` drawn anew in every pass, from a key and the number of the pass: equal on all ranks,
    continued after loading a `state_dict`, and no generator that dropout uses is touched."""

    parts = ("state",)
    renewed = True

    def create(self, source: Shape, site: Shape, generator: torch.Generator) -> Weights:
        return (new_state(generator),)

    def renew(self, weights: Weights) -> None:
        weights[0][1] += 1

    def magnitudes(self, own: Weights, W: Tensor) -> Tensor:
        return (uniform(own[0], W.numel()) * self.layer.bound).to(W.dtype).view(W.shape)

    def bytes(self, source: Shape, site: Shape) -> int:
        return 16
