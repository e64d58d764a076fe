"""What a feedback operator must offer. Operators are frozen dataclasses; the weights are passed in."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

Shape = tuple[int, ...]
Weights = tuple[Tensor, ...]


def widened(t: Tensor) -> Tensor:
    """The tensor in float32, or as it is where it is wider."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


class Operator(ABC):
    """The form of a feedback connection. It holds hyper-parameters only, never tensors.

    Shapes: `source` and `site` are the feature dimensions of the two ends of an edge, with C and n features. The error `d` is
    `[M, *source]`, and an activity `h` is `[M, *site]`. M is the batch, or batch x tokens.

    The weights of an edge are a tuple of tensors, one for each name in `parts`. The first `learnable` of them may be learned.
    The others (signs, indices, fixed factors) never are. A `sized` operator fits only the shapes that it was created for. If
    an operator is `common`, all edges of a graph whose sources have the same shape use one set of weights, made for the
    largest site.

    Example:
        >>> import torch
        >>> import feedbackward as fb
        >>> operator = fb.Dense()
        >>> weights = operator.create((3,), (8,), torch.Generator())  # 3 classes, 8 features
        >>> error, h = torch.randn(5, 3), torch.randn(5, 8)
        >>> tuple(operator.send(weights, error, (8,)).shape)
        (5, 8)
        >>> (gradient,) = operator.correlate(weights, error, h, center=False)
        >>> torch.allclose(gradient, error.T @ h)
        True
    """

    parts: ClassVar[tuple[str, ...]] = ("B",)
    learnable: ClassVar[int] = 1
    sized: ClassVar[bool] = True
    common: ClassVar[bool] = False
    # whether `send` is the product of the error with a matrix
    linear: ClassVar[bool] = True
    # whether `renew` changes the weights for every pass
    renewed: ClassVar[bool] = False

    def fit(self, source: Shape, site: Shape, seed: int) -> Operator:
        """The operator that serves an edge of these shapes: this one, unless a class overrides it.

        `seed` is a digest of the learner's seed and the edge's name. Raises AttachError if the operator cannot serve the edge.
        The message begins with what is wrong and ends with the fix; the site's name is added in front.
        """
        return self

    @abstractmethod
    def create(self, source: Shape, site: Shape, generator: torch.Generator) -> Weights:
        """Initial weights for an edge of these shapes, on the CPU. Floating-point weights are float32."""

    def renew(self, weights: Weights) -> None:
        """For `renewed` operators: change the weights in place, at the beginning of a pass under cuts.

        A pass sends its errors through a copy of the weights that its own beginning made.
        """
        raise NotImplementedError(f"{type(self).__name__} says that it is renewed, but not how.")

    def share(self, weights: Weights, grad: Tensor) -> Weights:
        """For an edge that `shares` the gradient of a layer's weight: the gradients of its learnable weights.

        They are made from `grad`. None of them may be `grad` itself.
        """
        return (grad.clone(),)

    @abstractmethod
    def send(self, weights: Weights, d: Tensor, site: Shape) -> Tensor:
        """The teaching signal `[M, *site]` of the error `d: [M, *source]`. Linear in `d` unless documented."""

    def correlate(self, weights: Weights, d: Tensor, h: Tensor, center: bool) -> Weights:
        """The gradients of the learnable weights, if the dense `B` that they stand for has the gradient `d^T h`.

        `center` first subtracts the mean of `h` over M (the mean of each channel, for weights that are shared over space).
        """
        raise NotImplementedError(f"{type(self).__name__} feedback cannot be learned")

    def average(self, weight: Tensor, d: Tensor, u: Tensor) -> Tensor:
        """`d^T u` in the form of the weight, averaged over the samples, for operators with one part.

        For a kernel it is also averaged over the places that a weight takes part in. `d: [M, *source]`, `u: [M, *site]`.
        """
        (products,) = self.correlate((weight,), d, u, center=False)
        (places,) = self.correlate(
            (weight,), torch.ones_like(d[:1]), torch.ones_like(u[:1]), center=False
        )
        return products / (len(d) * places.clamp_min(1))

    def gram(self, weights: Weights, source: Shape, site: Shape) -> Tensor:
        """The product `B B^T: [C, C]` of the matrix that the weights stand for."""
        B = widened(self.dense(weights, source, site))
        return B @ B.t()

    def gram_macs(self, source: Shape, site: Shape) -> int:
        """Multiply-adds of `gram`."""
        units = math.prod(source)
        return units * self.macs(source, site) + units**2 * math.prod(site)

    def dense(self, weights: Weights, source: Shape, site: Shape) -> Tensor:
        """The matrix `B: [C, n]` that the weights stand for, its columns in any order."""
        like = weights[0]
        unit = torch.eye(math.prod(source), dtype=like.dtype, device=like.device)
        sent = self.send(weights, unit.reshape(-1, *source), site)
        return sent.reshape(len(sent), -1)

    def decay(self, weights: Weights, source: Shape, site: Shape) -> Weights:
        """The gradients of the learnable weights, if the dense `B` that they stand for has the gradient `B`."""
        like = weights[0]
        unit = torch.eye(math.prod(source), dtype=like.dtype, device=like.device).reshape(
            -1, *source
        )
        return self.correlate(weights, unit, self.send(weights, unit, site), center=False)

    @abstractmethod
    def macs(self, source: Shape, site: Shape) -> int:
        """Multiply-adds of `send` for one sample."""

    def macs_per_pass(self, source: Shape, site: Shape) -> int:
        """Multiply-adds of `send` besides those of the samples."""
        return 0

    @abstractmethod
    def bytes(self, source: Shape, site: Shape) -> int:
        """Bytes of the weights that `create` makes, floating-point ones at four bytes each."""


def within(holder: object) -> Iterator[object]:
    """The holder, the operators in its fields, and those in theirs."""
    yield holder
    for part in getattr(holder, "__dict__", {}).values():
        if isinstance(part, Operator):
            yield from within(part)
