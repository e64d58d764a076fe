"""Feedback operators with the dense matrices that they stand for, written out from their definitions, entry by entry."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from pairs import F64
from torch import Tensor

import feedbackward as fb


@dataclass(frozen=True)
class Form:
    """`dense(operator, weights, source, site)` gives [C, n]; `macs`, `bytes`: of this edge, counted by hand."""

    operator: fb.Operator
    source: fb.Shape
    site: fb.Shape
    dense: Callable[[fb.Operator, fb.Weights, fb.Shape, fb.Shape], Tensor]
    macs: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.operator}-{self.source}-{self.site}".replace(" ", "")

    def fitted(self, seed: int = 5) -> fb.Operator:
        return self.operator.fit(self.source, self.site, seed)

    def weights(self, seed: int = 0, dtype: torch.dtype = F64) -> fb.Weights:
        made = self.fitted().create(self.source, self.site, torch.Generator().manual_seed(seed))
        return tuple(w.to(dtype) if w.is_floating_point() else w for w in made)

    def pass_(self, batch: int = 4, seed: int = 1) -> tuple[Tensor, Tensor]:
        """An error and an activity whose mean is not zero."""
        generator = torch.Generator().manual_seed(seed)
        d = torch.randn(batch, *self.source, generator=generator, dtype=F64)
        return d, torch.randn(batch, *self.site, generator=generator, dtype=F64) + 0.7


def plain(operator: fb.Operator, weights: fb.Weights, source: fb.Shape, site: fb.Shape) -> Tensor:
    return weights[0].reshape(math.prod(source), math.prod(site))


def shared(operator: fb.Operator, weights: fb.Weights, source: fb.Shape, site: fb.Shape) -> Tensor:
    return torch.stack(
        [torch.stack([row[j] for j in range(math.prod(site))]) for row in weights[0]]
    )


def sparse(operator: fb.Operator, weights: fb.Weights, source: fb.Shape, site: fb.Shape) -> Tensor:
    values, index = (w.reshape(len(w), -1) for w in weights)
    dense = torch.zeros(math.prod(source), math.prod(site), dtype=values.dtype)
    for k, j in np.ndindex(*values.shape):
        assert dense[int(index[k, j]), j] == 0, "a unit twice"
        dense[int(index[k, j]), j] = values[k, j]
    return dense


def binary(operator: fb.Operator, weights: fb.Weights, source: fb.Shape, site: fb.Shape) -> Tensor:
    C, n = math.prod(source), math.prod(site)
    packed, s = weights[0].tolist(), operator.scale * math.sqrt(2 / n)  # type: ignore[attr-defined]
    signs = [s if packed[i // 8] >> (i % 8) & 1 else -s for i in range(C * n)]
    return torch.tensor(signs, dtype=F64).reshape(C, n)


def low_rank(
    operator: fb.Operator, weights: fb.Weights, source: fb.Shape, site: fb.Shape
) -> Tensor:
    U, V = weights
    return sum(torch.outer(U[:, r], V[r].flatten()) for r in range(U.shape[1]))  # type: ignore[return-value]


def pooled(operator: fb.Operator, weights: fb.Weights, source: fb.Shape, site: fb.Shape) -> Tensor:
    (B,) = weights
    size = operator.size or max(site)  # type: ignore[attr-defined]
    columns = [B[(slice(None), i, *(y // size for y in place))] for i, *place in np.ndindex(*site)]
    return torch.stack(columns, 1)


def kernel(operator: fb.Operator, weights: fb.Weights, source: fb.Shape, site: fb.Shape) -> Tensor:
    """From every unit, by every weight of the kernel, to the place it leads to, if it is in the site."""
    B, k = weights[0], operator.size  # type: ignore[attr-defined]
    space = source[1:] or site[1:]
    strides = [h // h2 for h, h2 in zip(site[1:], space, strict=True)]
    groups = operator.groups  # type: ignore[attr-defined]
    per_group, inner = source[0] // groups, site[0] // groups
    dense = torch.zeros(source[0], *space, *site, dtype=B.dtype)
    for c, i in np.ndindex(source[0], inner):
        for place in np.ndindex(*space):
            for t in np.ndindex(*[k] * len(space)):
                step = [operator.dilation * (a - k // 2) for a in t]  # type: ignore[attr-defined]
                y = [s * p + o for s, p, o in zip(strides, place, step, strict=True)]
                if all(0 <= a < h for a, h in zip(y, site[1:], strict=True)):
                    dense[(c, *place, c // per_group * inner + i, *y)] += B[(c, i, *t)]
    if len(source) == 1:  # the error is the same at all places
        return dense.flatten(1, len(space)).sum(1).reshape(source[0], -1)
    return dense.reshape(math.prod(source), -1)


def seeded(operator: fb.Operator, weights: fb.Weights, source: fb.Shape, site: fb.Shape) -> Tensor:
    """The hash in Python's integers."""
    C, n = math.prod(source), math.prod(site)
    seed = operator.seed  # type: ignore[attr-defined]
    stream = mixed(mixed(seed % 2**32) ^ (seed >> 32))

    def word(i: int) -> int:
        return mixed(mixed(i % 2**32) ^ (i >> 32) ^ stream)

    if operator.distribution == "binary":  # type: ignore[attr-defined]
        factor, values = 2, [2.0 * (word(i // 32) >> (i % 32) & 1) - 1 for i in range(C * n)]
    else:
        factor, values = 6, [(2 * (word(i) >> 8) + 1 - 2**24) / 2**24 for i in range(C * n)]
    bound = operator.scale * math.sqrt(factor / n)  # type: ignore[attr-defined]
    return (
        (torch.tensor(values) * torch.tensor(bound)).double().reshape(C, n)
    )  # a product of two float32


def mixed(x: int) -> int:
    """The 32-bit mixer with multipliers 0x21f0aaad and 0x735a2d97 and shifts 16, 15, 15."""
    for multiplier, shift in ((0x21F0AAAD, 16), (0x735A2D97, 15)):
        x = ((x ^ x >> shift) * multiplier) % 2**32
    return x ^ x >> 15


FORMS = (
    Form(fb.Dense(), (3,), (4, 2, 3), plain, 3 * 24, 4 * 3 * 24),
    Form(fb.operators.Shared(), (3,), (7,), shared, 3 * 7, 4 * 3 * 7),
    Form(fb.operators.Shared("kaiming_uniform", 2.0), (2, 3), (2, 3, 2), shared, 6 * 12, 4 * 6 * 12),
    Form(fb.Sparse(), (5,), (13,), sparse, 13, 13 * 5),
    Form(fb.Sparse(3, scale=0.5), (2, 3), (2, 3, 3), sparse, 3 * 18, 3 * 18 * 5),
    Form(fb.Sparse(4), (4,), (6,), sparse, 4 * 6, 4 * 6 * 5),
    Form(fb.Sparse(2), (300,), (7,), sparse, 2 * 7, 2 * 7 * 8),
    Form(fb.operators.Binary(), (3,), (7,), binary, 21, 3),
    Form(fb.operators.Binary(0.5), (4, 2), (2, 3, 2), binary, 8 * 12, 12),
    Form(fb.LowRank(1), (3,), (7,), low_rank, 3 + 7, 4 * (3 + 7)),
    Form(fb.LowRank(3, "scaled_normal"), (2, 3), (2, 3, 2), low_rank, 3 * 18, 4 * 3 * 18),
    Form(fb.Pooled(), (3,), (2, 5), pooled, 3 * 2, 4 * 3 * 2),
    Form(fb.Pooled(2), (3,), (2, 5, 4), pooled, 3 * 2 * 6, 4 * 3 * 2 * 6),
    Form(fb.Pooled(3, "scaled_uniform"), (2, 2), (2, 3, 4, 2), pooled, 4 * 2 * 2, 4 * 4 * 2 * 2),
    Form(fb.operators.Kernel(), (3, 2, 3), (4, 4, 6), kernel, 6 * 3 * 4 * 9, 4 * 3 * 4 * 9),
    Form(fb.operators.Kernel(3, dilation=2, groups=2), (4, 5), (6, 5), kernel, 5 * 4 * 3 * 3, 4 * 4 * 3 * 3),
    Form(fb.operators.Kernel(1), (2, 2, 1, 2), (3, 2, 3, 2), kernel, 4 * 2 * 3, 4 * 2 * 3),
    Form(fb.operators.Kernel(5), (3,), (2, 4, 3), kernel, 3 * 2 * 25 + 25 * 24, 4 * 3 * 2 * 25),
    Form(fb.operators.Kernel(3, dilation=2, groups=2), (4,), (2, 6), kernel, 4 * 3 + 3 * 12, 4 * 4 * 3),
    Form(fb.operators.Seeded(), (3,), (7,), seeded, 21, 0),
    Form(fb.operators.Seeded(0.5, "binary"), (4, 2), (2, 3, 2), seeded, 8 * 12, 0),
)  # fmt: skip
