"""Layer-shaped feedback with the signs of the layer's own weight: one bit per weight is transported."""

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
    """`B = M * sign(W)` for an edge with the `forward_weight` `W`. Where `W` is zero, `B` is zero.

    layer: the layer's form; its `init` and `scale` give the law U(-b, b) of the magnitudes.
    follow_norm: scale `B` in every pass to the Frobenius norm of `W`. This transports one more number per layer.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> form = fb.operators.LayerForm.of(nn.Linear(8, 3))
        >>> layer = fb.operators.LayerShaped(form)
        >>> operator = fb.operators.UniformSigned(layer)
        >>> W, error = torch.randn(3, 8), torch.randn(5, 3)
        >>> signal = operator.send((W,), error, (8,))
        >>> torch.allclose(signal, operator.magnitudes((), W) * error @ W.sign())
        True
    """

    sized = False
    learnable = 0

    layer: LayerShaped
    follow_norm: bool = False

    @abstractmethod
    def magnitudes(self, own: Weights, W: Tensor) -> Tensor | float:
        """M, of the shape of `W` or one number. `own` are the edge's own tensors."""

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
    """One magnitude for the whole layer: the standard deviation b / sqrt(3) of the law. It stores nothing.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> form = fb.operators.LayerForm.of(nn.Linear(8, 3))
        >>> layer = fb.operators.LayerShaped(form)
        >>> operator = fb.operators.UniformSigned(layer)
        >>> weights = operator.create((3,), (8,), torch.Generator())
        >>> W, error = torch.randn(3, 8), torch.randn(5, 3)
        >>> tuple(operator.send((*weights, W), error, (8,)).shape)
        (5, 8)
        >>> [tuple(own.shape) for own in weights]
        []
    """

    parts = ()

    def create(self, source: Shape, site: Shape, generator: torch.Generator) -> Weights:
        return ()

    def magnitudes(self, own: Weights, W: Tensor) -> float:
        return self.layer.bound / 3**0.5

    def bytes(self, source: Shape, site: Shape) -> int:
        return 0


@dataclass(frozen=True)
class FixedSigned(Signed):
    """Magnitudes `M = |U(-b, b)|` drawn once.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> form = fb.operators.LayerForm.of(nn.Linear(8, 3))
        >>> layer = fb.operators.LayerShaped(form)
        >>> operator = fb.operators.FixedSigned(layer)
        >>> weights = operator.create((3,), (8,), torch.Generator())
        >>> W, error = torch.randn(3, 8), torch.randn(5, 3)
        >>> tuple(operator.send((*weights, W), error, (8,)).shape)
        (5, 8)
        >>> [tuple(own.shape) for own in weights]
        [(3, 8)]
    """

    parts = ("M",)

    def create(self, source: Shape, site: Shape, generator: torch.Generator) -> Weights:
        return (self.layer.create(source, site, generator)[0].abs(),)

    def magnitudes(self, own: Weights, W: Tensor) -> Tensor:
        return own[0]

    def bytes(self, source: Shape, site: Shape) -> int:
        return self.layer.bytes(source, site)


@dataclass(frozen=True)
class FreshSigned(Signed):
    """Magnitudes `M = |U(-b, b)|` drawn again in every pass, from a key and the number of the pass.

    They are equal on all ranks, go on after loading a `state_dict`, and use no generator that dropout draws from.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> form = fb.operators.LayerForm.of(nn.Linear(8, 3))
        >>> layer = fb.operators.LayerShaped(form)
        >>> operator = fb.operators.FreshSigned(layer)
        >>> weights = operator.create((3,), (8,), torch.Generator())
        >>> W, error = torch.randn(3, 8), torch.randn(5, 3)
        >>> tuple(operator.send((*weights, W), error, (8,)).shape)
        (5, 8)
        >>> [tuple(own.shape) for own in weights]
        [(2,)]
    """

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
