"""Decoders: feedback that maps activities, and sends the difference between a target and an activity."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from feedbackward.errors import AttachError
from feedbackward.operators.base import Operator, Shape, Weights, widened

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda a: a,
    "tanh": torch.tanh,
    "relu": torch.relu,
}
LARGEST = 1e9  # bytes of one decoder's weights


def pair(s: Tensor, step: Tensor) -> Tensor:
    """The message to a decoder, `[M, 2, *source]`: the source's activity `s` and its target `s - step`.

    It is float32 or wider, because half precision would lose a small step in `s`.
    """
    s, step = (widened(t) for t in (s, step))
    return torch.stack([s, s - step], 1)


@dataclass(frozen=True)
class Decoding(Operator):
    r"""Feedback through a decoder `g`. An edge carries the pair (s, t) of the source's activity and its target.

    .. math:: \delta h = (g(s) - g(t)) / (\beta M)

    With :math:`t = s - \beta M d` the signal tends to :math:`d\, \partial g / \partial s` for small beta, and is equal to it if
    `g` is linear.

    activation: the elementwise function after the last affine map: `"linear"`, `"tanh"` or `"relu"`.
    beta: the distance of the targets, which the rule sets.
    """

    activation: str = "linear"
    beta: float = 1.0

    parts: ClassVar[tuple[str, ...]] = ("B", "bias")
    learnable = 2
    linear = False

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise AttachError(
                f"unknown activation {self.activation!r} of a decoder: choose one of {', '.join(ACTIVATIONS)}."
            )
        if not self.beta > 0:
            raise AttachError(f"the targets' distance beta is {self.beta}: it must be above 0.")

    def fit(self, source: Shape, site: Shape, seed: int) -> Operator:
        size = self.bytes(source, site)
        if size > LARGEST:
            raise AttachError(
                f"a dense decoder from {math.prod(source)} to {math.prod(site)} units would hold {size / 1e9:.1f} GB. Name fewer "
                "and smaller sites with `sites=`, or use DDTP, which decodes the output only."
            )
        return self

    @abstractmethod
    def decode(self, weights: Weights, s: Tensor, site: Shape) -> Tensor:
        """`g(s): [M, *site]` of `s: [M, *source]`."""

    def send(self, weights: Weights, d: Tensor, site: Shape) -> Tensor:
        """The teaching signal of a `pair`; not linear in the error unless `g` is."""
        s, t = d.unbind(1)
        same = tuple(w.to(d.dtype) for w in weights)
        return (self.decode(same, s, site) - self.decode(same, t, site)) / (self.beta * len(d))

    def _affine(self, B: Tensor, bias: Tensor, s: Tensor, site: Shape) -> Tensor:
        out = torch.addmm(bias.flatten(), s.reshape(len(s), -1), B.reshape(len(B), -1))
        return ACTIVATIONS[self.activation](out).reshape(len(s), *site)


@dataclass(frozen=True)
class Decoder(Decoding):
    r""":math:`g(s) = f(s B + b)`, `B: [C, *site]`, started like Xavier: U(-b, b), b = sqrt(6 / (C + n))."""

    def create(self, source: Shape, site: Shape, generator: torch.Generator) -> Weights:
        return _layer(math.prod(source), site, generator)

    def decode(self, weights: Weights, s: Tensor, site: Shape) -> Tensor:
        B, bias = weights
        return self._affine(B, bias, s, site)

    def reach(self, s: Tensor) -> Tensor:
        """The mean over M of the squared slope of one output by all of its weights, where the activation's slope is 1."""
        return s.square().sum() / len(s) + 1

    def macs(self, source: Shape, site: Shape) -> int:
        return 2 * math.prod(source) * math.prod(site)

    def bytes(self, source: Shape, site: Shape) -> int:
        return 4 * (math.prod(source) + 1) * math.prod(site)


@dataclass(frozen=True)
class MapDecoder(Decoding):
    r""":math:`g(s) = f(B * \mathrm{resize}(s) + b)` from map to map: the source `[c', *space']`, repeated or thinned out to the
    space of the site `[c, *space]`, under a convolution `B: [c', c, k, ...]` with an odd kernel k; `b: [c]`.

    above, below: the shapes of the two maps, whose activities may be flat.
    """

    above: Shape = ()
    below: Shape = ()
    kernel: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise AttachError(f"the kernel of a decoder of maps is {self.kernel}: it must be odd.")

    def create(self, source: Shape, site: Shape, generator: torch.Generator) -> Weights:
        ends = self.above[0], self.below[0]
        size = (self.kernel,) * len(self.below[1:])
        bound = math.sqrt(6 / (sum(ends) * math.prod(size)))
        B = torch.empty(*ends, *size).uniform_(-bound, bound, generator=generator)
        return B, torch.zeros(self.below[0])

    def decode(self, weights: Weights, s: Tensor, site: Shape) -> Tensor:
        B, bias = weights
        conv = (F.conv1d, F.conv2d, F.conv3d)[B.dim() - 3]
        out = conv(self._resized(s), B.transpose(0, 1), bias, padding=self.kernel // 2)
        return ACTIVATIONS[self.activation](out).reshape(len(s), *site)

    def reach(self, s: Tensor) -> Tensor:
        """The same for an output channel, summed over its places."""
        read = self._resized(s)
        taps = self.kernel ** (read.dim() - 2)
        return taps * read.square().sum() / len(read) + math.prod(self.below[1:])

    def _resized(self, s: Tensor) -> Tensor:
        return F.interpolate(s.reshape(len(s), *self.above), size=self.below[1:])

    def macs(self, source: Shape, site: Shape) -> int:
        taps = self.kernel ** len(self.below[1:])
        return 2 * taps * self.above[0] * math.prod(self.below)

    def bytes(self, source: Shape, site: Shape) -> int:
        taps = self.kernel ** len(self.below[1:])
        return 4 * (taps * self.above[0] + 1) * self.below[0]


@dataclass(frozen=True)
class RandomHiddenDecoder(Decoding):
    r""":math:`g(s) = f(\tanh(s R) B + b)`: a fixed random hidden layer `R: [C, hidden]`, N(0, 1/C), and a learned
    `B: [hidden, *site]` and b."""

    hidden: int = 2048

    parts = ("B", "bias", "R")

    def create(self, source: Shape, site: Shape, generator: torch.Generator) -> Weights:
        size = math.prod(source)
        R = torch.empty(size, self.hidden).normal_(std=size**-0.5, generator=generator)
        return (*_layer(self.hidden, site, generator), R)

    def decode(self, weights: Weights, s: Tensor, site: Shape) -> Tensor:
        B, bias, R = weights
        return self._affine(B, bias, torch.tanh(s.reshape(len(s), -1) @ R), site)

    def macs(self, source: Shape, site: Shape) -> int:
        return 2 * self.hidden * (math.prod(source) + math.prod(site))

    def bytes(self, source: Shape, site: Shape) -> int:
        return 4 * ((self.hidden + 1) * math.prod(site) + math.prod(source) * self.hidden)


def _layer(size: int, site: Shape, generator: torch.Generator) -> Weights:
    bound = math.sqrt(6 / (size + math.prod(site)))
    return torch.empty(size, *site).uniform_(-bound, bound, generator=generator), torch.zeros(site)
