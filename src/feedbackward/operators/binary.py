"""Binary feedback: random signs, one bit each."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from feedbackward.operators.base import Operator, Shape, Weights
from feedbackward.operators.dense import rows
from feedbackward.operators.options import check_scale


@dataclass(frozen=True)
class Binary(Operator):
    r"""`B` in {-s, s} of shape `[C, *site]`, fixed, kept as one bit per weight.

    .. math:: \delta h = s\, d \,\mathrm{sign}, \qquad s = \mathrm{scale} \sqrt{2 / n}

    s is the standard deviation of :class:`Dense`'s default. It is not stored. Weight i of the flattened `[C, n]` is bit
    i mod 8, from the lowest, of byte i // 8; a set bit is +s. The bits are unpacked for the product, one edge at a time.

    scale: a factor on s.

    Han & Yoo, "Efficient Convolutional Neural Network Training with Direct Feedback Alignment", 2019 (arXiv:1901.01986).
    They take the signs of a random matrix.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.DFA(operator=fb.operators.Binary()), example=x)
        >>> nn.functional.cross_entropy(learner(x), y).backward()
        >>> learner.feedback_bytes  # 3 x 8 bits
        3
    """

    parts = ("bits",)
    learnable = 0

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_scale(self.scale)

    def create(self, source: Shape, site: Shape, generator: torch.Generator) -> Weights:
        size = (self.bytes(source, site),)
        return (torch.randint(256, size, dtype=torch.uint8, generator=generator),)

    def send(self, weights: Weights, d: Tensor, site: Shape) -> Tensor:
        d, n = rows(d), math.prod(site)
        places = torch.arange(8, dtype=torch.uint8, device=d.device)
        bits = (weights[0].unsqueeze(1) >> places) & 1
        signs = bits.flatten()[: d.shape[1] * n].reshape(d.shape[1], n).to(d.dtype) * 2 - 1
        return ((d @ signs) * self.magnitude(site)).reshape(len(d), *site)

    def magnitude(self, site: Shape) -> float:
        """s, the absolute value of every weight."""
        return self.scale * math.sqrt(2 / math.prod(site))

    def macs(self, source: Shape, site: Shape) -> int:
        return math.prod(source) * math.prod(site)

    def bytes(self, source: Shape, site: Shape) -> int:
        return -(-math.prod(source) * math.prod(site) // 8)
