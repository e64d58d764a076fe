"""Feedback whose directions are orthogonal and equally strong, whatever its weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from feedbackward.operators.base import Operator, Shape, Weights, widened
from feedbackward.operators.dense import Dense, rows
from feedbackward.operators.options import check_scale

LARGEST = 1024
STEPS = 10


@dataclass(frozen=True)
class Orthogonal(Operator):
    r"""Sends by the orthogonal matrix next to the `B: [C, n]` that stands for the weights of `form`, times `strength`.

    .. math:: \delta h = \mathrm{strength} \cdot d\, (B B^\top)^{-1/2} B

    Only the directions in B count, not how strong it is nor which directions are stronger: so the signal has its full size
    from the second step on, at any learning rate of B and under any optimizer. B = 0 sends nothing. The inverse root is that of
    ten steps of Newton and Schulz: of the singular values of :math:`B / \lVert B \rVert_F` those above 1/50 come to 1, and
    smaller ones grow by the factor 57.

    Learned, the weights get the gradients that `form` gives them. A pass costs :math:`30 C^3 + C^2 n` multiplications for
    each site besides the signals, with n weights for each source unit. For sources of more than 1,024 units that is too much:
    then Dense feedback gets the norm that an orthogonal matrix would have, and no more; other forms serve as they are.

    form: of the weights. strength: :math:`\lVert \delta h \rVert / \lVert d \rVert` where all directions are equally strong.

    Björck & Bowie, "An iterative algorithm for computing the best estimate of an orthogonal matrix", 1971, has the iteration;
    Muon (Jordan et al. 2024) uses one like it for the updates of forward weights.

    Example:
        >>> import torch
        >>> import feedbackward as fb
        >>> operator = fb.operators.Orthogonal(fb.Dense(), strength=2.0)
        >>> weights = operator.create((3,), (8,), torch.Generator().manual_seed(0))
        >>> sent = operator.send(weights, torch.eye(3), (8,))
        >>> torch.allclose(sent @ sent.T, 4 * torch.eye(3), atol=1e-4)
        True
    """

    form: Operator
    strength: float = 0.2
    steps: int = STEPS

    def __post_init__(self) -> None:
        check_scale(self.strength)
        for name in ("parts", "learnable", "sized", "common", "renewed"):
            object.__setattr__(self, name, getattr(self.form, name))

    def fit(self, source: Shape, site: Shape, seed: int) -> Operator:
        form = self.form.fit(source, site, seed)
        if math.prod(source) <= LARGEST:
            return Orthogonal(form, self.strength, self.steps)
        return Orthogonal(form, self.strength, 0) if isinstance(form, Dense) else form

    def create(self, source: Shape, site: Shape, generator: torch.Generator) -> Weights:
        return self.form.create(source, site, generator)

    def renew(self, weights: Weights) -> None:
        self.form.renew(weights)

    def send(self, weights: Weights, d: Tensor, site: Shape) -> Tensor:
        source = tuple(d.shape[1:])
        if self.steps:
            gram = self.form.gram(weights, source, site)
            turned = rows(d) @ (self.strength * _inverse_root(gram, self.steps)).to(d.dtype)
        else:
            B = widened(self.form.dense(weights, source, site))
            turned = rows(d) * (self.strength * _inverse_norm(B)).to(d.dtype)
        return self.form.send(weights, turned.reshape(d.shape), site)

    def correlate(self, weights: Weights, d: Tensor, h: Tensor, center: bool) -> Weights:
        return self.form.correlate(weights, d, h, center)

    def decay(self, weights: Weights, source: Shape, site: Shape) -> Weights:
        return self.form.decay(weights, source, site)

    def macs(self, source: Shape, site: Shape) -> int:
        return self.form.macs(source, site)

    def macs_per_pass(self, source: Shape, site: Shape) -> int:
        if not self.steps:
            return 0
        return self.form.gram_macs(source, site) + 3 * self.steps * math.prod(source) ** 3

    def bytes(self, source: Shape, site: Shape) -> int:
        return self.form.bytes(source, site)


def _inverse_norm(B: Tensor) -> Tensor:
    """What gives `B: [C, n]` the norm of a matrix with C orthogonal rows of norm 1; 1 for B = 0."""
    norm = torch.linalg.vector_norm(B)
    return torch.where(norm > 0, math.sqrt(len(B)) / norm, 1.0)


def _inverse_root(gram: Tensor, steps: int) -> Tensor:
    """(B B^T)^(-1/2) of `B B^T: [C, C]`, as so many steps leave it; zero for B = 0."""
    total = gram.trace()
    scale = torch.where(total > 0, total, 1.0)
    gram = gram / scale
    unit = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    root, unit = unit / scale.sqrt(), 1.5 * unit
    for _ in range(steps):
        step = torch.sub(unit, gram, alpha=0.5)
        root = torch.mm(step, root)
        gram = torch.mm(torch.mm(step, gram), step)
    return root
