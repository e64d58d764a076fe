"""Shared feedback: one matrix for all sites."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from feedbackward.operators.base import Operator, Shape, Weights
from feedbackward.operators.dense import INITS, draw, outer, rows
from feedbackward.operators.options import check_init, check_scale


@dataclass(frozen=True)
class Shared(Operator):
    r"""One matrix `B: [C, m]` for all sites, where m is the size of the largest; a site of n features uses the first n columns.

    .. math:: \delta h_l = d\, B_{:, :n_l}

    Every site whose source has the same shape uses the same matrix, so a smaller site gets a part of the largest site's
    signal. The entries do not depend on the width of the site: the signal of a narrow one is :math:`\sqrt{n_l / m}` times as
    long as the widest one's. If the matrix is learned, it gets the sum of the sites' gradients.

    init: one of :class:`Dense`'s, with m in place of n. The default, U(-1, 1) / sqrt(m), is that of the authors' TinyDFA.
    scale: a factor on the initial weights.

    Launay, Poli & Krzakala 2019 (arXiv:1906.04554); Launay, Poli, Boniface & Krzakala, NeurIPS 2020 (arXiv:2006.12878).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> layers = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)]
        >>> model = nn.Sequential(*layers)
        >>> learner = fb.attach(model, fb.DKP(operator=fb.operators.Shared()), example=x)
        >>> nn.functional.cross_entropy(learner(x), y).backward()
        >>> [tuple(B.grad.shape) for B in learner.feedback.parameters()]  # one matrix, two sites
        [(3, 8)]
    """

    common = True

    init: str = "scaled_uniform"
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_init(self.init, INITS)
        check_scale(self.scale)

    def create(self, source: Shape, site: Shape, generator: torch.Generator) -> Weights:
        m = math.prod(site)
        return (draw(self.init, (math.prod(source), m), m, generator).mul_(self.scale),)

    def send(self, weights: Weights, d: Tensor, site: Shape) -> Tensor:
        (B,) = weights
        return (rows(d) @ B[:, : math.prod(site)]).reshape(len(d), *site)

    def correlate(self, weights: Weights, d: Tensor, h: Tensor, center: bool) -> Weights:
        return (self._padded(outer(rows(d), rows(h), center), weights),)

    def decay(self, weights: Weights, source: Shape, site: Shape) -> Weights:
        return (self._padded(weights[0][:, : math.prod(site)], weights),)

    def macs(self, source: Shape, site: Shape) -> int:
        return math.prod(source) * math.prod(site)

    def bytes(self, source: Shape, site: Shape) -> int:
        """Of the whole matrix, where `site` is the largest; it is held once for all sites."""
        return 4 * math.prod(source) * math.prod(site)

    def _padded(self, grad: Tensor, weights: Weights) -> Tensor:
        """A gradient of the first columns as one of the whole matrix."""
        return F.pad(grad, (0, weights[0].shape[1] - grad.shape[1]))
