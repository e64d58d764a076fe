"""A form of feedback for each edge by its size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from feedbackward.errors import AttachError
from feedbackward.operators.base import Operator, Shape, Weights
from feedbackward.operators.dense import Dense
from feedbackward.operators.low_rank import LowRank
from feedbackward.operators.pooled import Pooled

# how many weights a dense edge may always have; to a vector, how many, and how many per feature
ENOUGH, TO_VECTOR, PER_FEATURE = 2**20, 2**24, 4
RANK = 64


@dataclass(frozen=True)
class Auto(Operator):
    """Dense feedback where it is small, and elsewhere what fits: by patches of maps, of low rank to vectors and sequences.

    From C source units to n features, Dense has `C n` weights. They stay dense up to 2^20, and for vectors up to 2^24 and 4 n
    source units, as large as a layer of that width. Larger edges to maps `[c, H, W]` are :class:`Pooled` over the
    smallest patches that leave at most 2^20 weights, or over the whole space if none do. Larger ones to vectors and to
    sequences `[T, D]`, whose first dimension may not be channels, are :class:`LowRank` of rank 64. The choice depends on the
    shapes alone.

    init: as those have it.

    Example:
        >>> import feedbackward as fb
        >>> fb.operators.Auto().fit((10,), (64, 8, 8), 0)
        Dense(init='kaiming_uniform', scale=1.0)
        >>> fb.operators.Auto().fit((1000,), (64, 112, 112), 0)
        Pooled(size=28, init='kaiming_uniform', scale=1.0)
    """

    parts = ()
    learnable = 0

    init: str = "kaiming_uniform"

    def __post_init__(self) -> None:
        Dense(self.init)

    def fit(self, source: Shape, site: Shape, seed: int) -> Operator:
        return self._choice(source, site).fit(source, site, seed)

    def create(self, source: Shape, site: Shape, generator: torch.Generator) -> Weights:
        self._unfitted()

    def send(self, weights: Weights, d: Tensor, site: Shape) -> Tensor:
        self._unfitted()

    def macs(self, source: Shape, site: Shape) -> int:
        return self._choice(source, site).macs(source, site)

    def bytes(self, source: Shape, site: Shape) -> int:
        return self._choice(source, site).bytes(source, site)

    def _choice(self, source: Shape, site: Shape) -> Operator:
        C, n = math.prod(source), math.prod(site)
        wide = len(site) == 1 and PER_FEATURE * n >= C
        if C * n <= (TO_VECTOR if wide else ENOUGH):
            return Dense(self.init)
        if len(site) > 2:
            return Pooled(_patch(C, site), self.init)
        return LowRank(min(RANK, C, n), self.init)

    def _unfitted(self) -> NoReturn:
        raise AttachError(
            "Auto only chooses an operator for each edge: use the one that fit(source, site, seed) returns."
        )


def _patch(units: int, site: Shape) -> int | None:
    """The side of the smallest patches that leave few enough weights; None for one patch."""
    channels, *space = site
    for side in range(2, max(space)):
        if units * channels * math.prod(-(-length // side) for length in space) <= ENOUGH:
            return side
    return None
