"""Sparse feedback: every feature of a site listens to a few units of the source."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from feedbackward.errors import AttachError
from feedbackward.operators.base import Operator, Shape, Weights
from feedbackward.operators.dense import rows
from feedbackward.operators.options import check_count, check_scale


@dataclass(frozen=True)
class Sparse(Operator):
    r"""Exactly s = `nonzeros` weights per feature, on s different units of the source.

    .. math:: \delta h_{mj} = \sum_{k=1}^{s} v_{kj}\, d_{m, c_k(j)}, \qquad v, c: [s, *site]

    The units c are random, fixed and balanced: for each k, and for all k together, the numbers of features that listen to any
    two units differ by at most one. The values `v` start as U(-1/q, 1/q) with q = sqrt(n / sqrt(C s)), as in the authors' code.
    They can be learned: they get their entries of :math:`d^\top h`.

    nonzeros: s, at most C.
    scale: a factor on the initial values.

    Crafton, Parihar, Gebhardt & Raychowdhury, "Direct Feedback Alignment With Sparse Connections for Local Learning",
    Frontiers in Neuroscience 13:525, 2019 (arXiv:1903.02083).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.DKP(operator=fb.Sparse(1)), example=x)
        >>> nn.functional.cross_entropy(learner(x), y).backward()
        >>> [tuple(B.grad.shape) for B in learner.feedback.parameters()]
        [(1, 8)]
    """

    parts = ("values", "index")

    nonzeros: int = 1
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_count("nonzeros", self.nonzeros)
        check_scale(self.scale)

    def fit(self, source: Shape, site: Shape, seed: int) -> Operator:
        if self.nonzeros > math.prod(source):
            raise AttachError(
                f"nonzeros={self.nonzeros}, but its source has only {math.prod(source)} units to listen to: use at most that "
                "many, or Dense feedback, which listens to all."
            )
        return self

    def create(self, source: Shape, site: Shape, generator: torch.Generator) -> Weights:
        C, n, s = math.prod(source), math.prod(site), self.nonzeros
        bound = self.scale / math.sqrt(n / math.sqrt(C * s))
        values = torch.zeros(s, *site).uniform_(-1.0, 1.0, generator=generator).mul_(bound)
        index = _supports(C, n, s, generator).to(_index_dtype(C)).reshape(s, *site)
        return values, index

    def send(self, weights: Weights, d: Tensor, site: Shape) -> Tensor:
        values, index = weights
        d = rows(d)
        signal = values[0] * _gather(d, index[0])
        for v, c in zip(values[1:], index[1:], strict=True):
            signal = signal.addcmul(v, _gather(d, c))
        return signal

    def correlate(self, weights: Weights, d: Tensor, h: Tensor, center: bool) -> Weights:
        d, grads = rows(d), []
        for c in weights[1]:
            grad = (_gather(d, c) * h).sum(0)
            if center:  # without a centred copy of h
                grad = grad - _gather(d.sum(0, keepdim=True), c)[0] * h.mean(0)
            grads.append(grad)
        return (torch.stack(grads),)

    def decay(self, weights: Weights, source: Shape, site: Shape) -> Weights:
        return weights[:1]

    def macs(self, source: Shape, site: Shape) -> int:
        return self.nonzeros * math.prod(site)

    def bytes(self, source: Shape, site: Shape) -> int:
        return self.nonzeros * math.prod(site) * (4 + _index_dtype(math.prod(source)).itemsize)


def _gather(d: Tensor, units: Tensor) -> Tensor:
    """`d[:, units]`, [M, *site]."""
    return d.index_select(1, units.flatten().long()).reshape(len(d), *units.shape)


def _index_dtype(units: int) -> torch.dtype:
    """One byte if that is enough. It is never int16, which torch.distributed cannot send, so that DDP would fail."""
    return torch.uint8 if units <= 256 else torch.int32


def _supports(C: int, n: int, s: int, generator: torch.Generator) -> Tensor:
    """The units `[s, n]`: different ones in every column, with counts that differ by at most one, in each row and in total.

    The features are divided into decks of C. All units are shuffled into a circle for each deck, and feature i of the deck
    listens to s units of the circle in sequence, beginning with the i-th.
    """
    decks = torch.rand(n // C, C, generator=generator).argsort(1)
    whole = [decks.roll(-k, 1).flatten() for k in range(s)]
    # for the r features left over, row k takes the next r units of a circle, turned by one after each full round
    r = n % C
    circle = torch.randperm(C, generator=generator)
    k, i = torch.arange(s).unsqueeze(1), torch.arange(r)
    turns = k // (C // math.gcd(C, r))
    rest = circle[(k * r + (i + turns) % max(r, 1)) % C]
    return torch.cat([torch.stack(whole), rest], 1)[:, torch.randperm(n, generator=generator)]
