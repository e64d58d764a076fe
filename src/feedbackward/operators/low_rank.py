"""Low-rank feedback: a product of two thin matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from feedbackward.errors import AttachError
from feedbackward.operators.base import Operator, Shape, Weights, widened
from feedbackward.operators.dense import INITS, draw, outer, rows
from feedbackward.operators.options import check_count, check_init, check_scale


@dataclass(frozen=True)
class LowRank(Operator):
    r"""`B = U V` of rank r, with `U: [C, r]` and `V: [r, *site]`. The error passes through r numbers.

    .. math:: \delta h = (d\, U)\, V, \qquad \nabla U = d^\top (h V^\top), \qquad \nabla V = (d\, U)^\top h

    These are the gradients of the factors if the product has the gradient :math:`d^\top h`.

    rank: r, at most min(C, n).
    init: the initial V, one of :class:`Dense`'s. The entries of U have variance 1/r, so that those of `U V` have the variance
        of Dense's. With `"zeros"` V = 0 and U is random: if both were zero, neither would ever get a gradient.
    scale: a factor on the initial V.

    Crafton et al. 2019 (arXiv:1903.02083) use fixed low-rank feedback. Hanut & Kadmon 2025 (arXiv:2502.20580) and Li & Benna
    2024 (arXiv:2405.20594) learn the factors of layer-wise feedback, by other rules for U.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.DKP(operator=fb.LowRank(2)), example=x)
        >>> nn.functional.cross_entropy(learner(x), y).backward()
        >>> [tuple(B.grad.shape) for B in learner.feedback.parameters()]
        [(3, 2), (2, 8)]
    """

    parts = ("U", "V")
    learnable = 2

    rank: int = 8
    init: str = "kaiming_uniform"
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_count("rank", self.rank)
        check_init(self.init, INITS)
        check_scale(self.scale)

    def fit(self, source: Shape, site: Shape, seed: int) -> Operator:
        C, n = math.prod(source), math.prod(site)
        if self.rank > min(C, n):
            raise AttachError(
                f"rank={self.rank} for {C} source units and {n} features: a matrix of that shape has rank at most {min(C, n)}, "
                "so the factors would only add weights. Use Dense there, or a smaller rank."
            )
        return self

    def create(self, source: Shape, site: Shape, generator: torch.Generator) -> Weights:
        C, r = math.prod(source), self.rank
        bound = math.sqrt(3 / r)
        U = torch.zeros(C, r).uniform_(-bound, bound, generator=generator)
        return U, draw(self.init, (r, *site), math.prod(site), generator).mul_(self.scale)

    def send(self, weights: Weights, d: Tensor, site: Shape) -> Tensor:
        U, V = weights
        return ((rows(d) @ U) @ rows(V)).reshape(len(d), *site)

    def gram(self, weights: Weights, source: Shape, site: Shape) -> Tensor:
        # the matrix that the factors stand for may be too large to make
        U, V = (widened(rows(w)) for w in weights)
        return U @ (V @ V.t()) @ U.t()

    def gram_macs(self, source: Shape, site: Shape) -> int:
        C, r = math.prod(source), self.rank
        return r * r * math.prod(site) + C * r * r + C * C * r

    def correlate(self, weights: Weights, d: Tensor, h: Tensor, center: bool) -> Weights:
        U, V = (w.to(d.dtype) for w in weights)
        d, h = rows(d), rows(h)
        grad = outer(d @ U, h, center).reshape(V.shape)
        return outer(d, h @ rows(V).t(), center), grad

    def decay(self, weights: Weights, source: Shape, site: Shape) -> Weights:
        U, V = weights
        flat = rows(V)
        return U @ (flat @ flat.t()), ((U.t() @ U) @ flat).reshape(V.shape)

    def macs(self, source: Shape, site: Shape) -> int:
        return self.rank * (math.prod(source) + math.prod(site))

    def bytes(self, source: Shape, site: Shape) -> int:
        return 4 * self.rank * (math.prod(source) + math.prod(site))
