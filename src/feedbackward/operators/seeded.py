"""Seeded feedback: made from a seed for every product, and never stored."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from feedbackward.errors import AttachError
from feedbackward.operators.base import Operator, Shape, Weights
from feedbackward.operators.counter import words
from feedbackward.operators.dense import Dense
from feedbackward.operators.options import check_scale

DISTRIBUTIONS = ("uniform", "binary")
_CHUNK = 2**20  # weights at a time, so that their 64-bit integers are never in memory all at once


@dataclass(frozen=True)
class Seeded(Operator):
    r"""A fixed `B: [C, *site]` that is a function of the learner's seed, the site and the position. Nothing is stored.

    Weight i of the flattened `[C, n]` is made from a hash of the edge's seed and i, with integer operations. It has the same
    bits on every device, and does not depend on PyTorch's generators. While the signal of an edge is made, its matrix is in
    memory.

    scale: a factor on the weights.
    distribution: `"uniform"`: U(-b, b) with b = scale * sqrt(6 / n), as :class:`Dense`'s default. `"binary"`: -s or s with
        s = scale * sqrt(2 / n), as :class:`Binary`; 32 of them come from one hash.

    Han, Lee, Lee & Yoo, "A Low-Power Deep Neural Network Online Learning Processor for Real-Time Object Tracking Application",
    IEEE TCAS-I, 2019, generate the random feedback on the chip.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.DFA(operator=fb.operators.Seeded()), example=x)
        >>> nn.functional.cross_entropy(learner(x), y).backward()
        >>> learner.feedback_bytes
        0
    """

    parts = ()
    learnable = 0

    scale: float = 1.0
    distribution: str = "uniform"
    # the seed of the edge that this copy serves
    seed: int | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        check_scale(self.scale)
        if self.distribution not in DISTRIBUTIONS:
            raise AttachError(
                f"unknown distribution {self.distribution!r} of seeded feedback: choose one of {', '.join(DISTRIBUTIONS)}."
            )

    def fit(self, source: Shape, site: Shape, seed: int) -> Operator:
        fitted = replace(self)
        object.__setattr__(fitted, "seed", seed)
        return fitted

    def create(self, source: Shape, site: Shape, generator: torch.Generator) -> Weights:
        return ()

    def send(self, weights: Weights, d: Tensor, site: Shape) -> Tensor:
        B = self._matrix(d.shape[1:], site, d.device).to(d.dtype)
        return Dense().send((B,), d, site)

    def materialize(self, source: Shape, site: Shape) -> Tensor:
        """The matrix `[C, *site]`, float32: as the weights of :class:`Dense` it sends the same signals, bit by bit."""
        return self._matrix(source, site, None)

    def macs(self, source: Shape, site: Shape) -> int:
        """Of the product; the hashes are integer operations and come on top."""
        return math.prod(source) * math.prod(site)

    def bytes(self, source: Shape, site: Shape) -> int:
        return 0

    def _matrix(self, source: Shape, site: Shape, device: torch.device | None) -> Tensor:
        if self.seed is None:
            raise AttachError(
                "this Seeded feedback has no seed yet: use the operator that fit(source, site, seed) returns."
            )
        binary, n = self.distribution == "binary", math.prod(site)
        size, per_word, make = (
            math.prod(source) * n,
            32 if binary else 1,
            _signs if binary else _uniform,
        )
        count = -(-size // per_word)
        step = count if torch.compiler.is_compiling() else _CHUNK // per_word
        B = torch.empty(count * per_word, dtype=torch.float32, device=device)
        for start in range(0, count, step):
            stop = min(start + step, count)
            B[start * per_word : stop * per_word] = make(words(self.seed, start, stop, device))
        return B[:size].mul_(self.scale * math.sqrt((2 if binary else 6) / n)).reshape(-1, *site)


def _uniform(bits: Tensor) -> Tensor:
    """In (-1, 1), float32: the 2**24 odd multiples of 2**-24, exact and symmetric about zero."""
    return ((bits >> 8) * 2 + (1 - 2**24)).float() * 2.0**-24


def _signs(bits: Tensor) -> Tensor:
    """The bits of each word from the lowest, as -1 and 1, float32."""
    places = torch.arange(32, device=bits.device)
    return (((bits.unsqueeze(1) >> places) & 1) * 2 - 1).flatten().float()
