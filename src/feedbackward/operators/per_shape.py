"""A form of feedback for maps and another for vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from feedbackward.errors import AttachError
from feedbackward.operators.base import Operator, Shape, Weights


@dataclass(frozen=True)
class PerShape(Operator):
    """One operator for maps and another for vectors: convolutional nets have maps below and vectors above.

    maps: the operator for sites with channels and space, `[c, H, ...]`.
    vectors: the operator for the other sites, `[n]`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 1, 6, 6), torch.randint(3, (16,))
        >>> model = nn.Sequential(
        ...     nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)
        ... )
        >>> operator = fb.PerShape(maps=fb.Pooled(), vectors=fb.Dense())
        >>> learner = fb.attach(model, fb.DFA(operator=operator), example=x, sites=["1", "4"])
        >>> [tuple(B.shape) for B in learner.feedback.buffers()]
        [(3, 4, 1, 1), (3, 8)]
    """

    parts = ()
    learnable = 0

    maps: Operator
    vectors: Operator

    def __post_init__(self) -> None:
        for name, given in (("maps", self.maps), ("vectors", self.vectors)):
            if not isinstance(given, Operator):
                raise AttachError(
                    f"PerShape's {name} must be an instance of an Operator, for example fb.Dense(), not {given!r}."
                )

    def fit(self, source: Shape, site: Shape, seed: int) -> Operator:
        return self._choice(site).fit(source, site, seed)

    def create(self, source: Shape, site: Shape, generator: torch.Generator) -> Weights:
        self._unfitted()

    def send(self, weights: Weights, d: Tensor, site: Shape) -> Tensor:
        self._unfitted()

    def macs(self, source: Shape, site: Shape) -> int:
        return self._choice(site).macs(source, site)

    def bytes(self, source: Shape, site: Shape) -> int:
        return self._choice(site).bytes(source, site)

    def _choice(self, site: Shape) -> Operator:
        return self.maps if len(site) > 1 else self.vectors

    def _unfitted(self) -> NoReturn:
        raise AttachError(
            "PerShape only chooses an operator for each edge: use the one that fit(source, site, seed) returns."
        )
