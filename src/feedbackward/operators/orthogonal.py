"""Feedback whose directions are orthogonal and equally strong, whatever its weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from feedbackward.operators.base import Operator, Shape, Weights
from feedbackward.operators.dense import rows
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

    Learned, the weights get the gradients that `form` gives them. A pass costs :math:`30 C^3 + 2 C^2 n` multiplications for
    each site besides the signals; for sources of more than 1,024 units `form` serves by itself.

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
    strength: float = 0.5

    def __post_init__(self) -> None:
        check_scale(self.strength)
        for name in ("parts", "learnable", "sized", "common", "renewed"):
            object.__setattr__(self, name, getattr(self.form, name))

    def fit(self, source: Shape, site: Shape, seed: int) -> Operator:
        form = self.form.fit(source, site, seed)
        return form if math.prod(source) > LARGEST else Orthogonal(form, self.strength)

    def create(self, source: Shape, site: Shape, generator: torch.Generator) -> Weights:
        return self.form.create(source, site, generator)

    def renew(self, weights: Weights) -> None:
        self.form.renew(weights)

    def send(self, weights: Weights, d: Tensor, site: Shape) -> Tensor:
        count = math.prod(d.shape[1:])
        units = torch.eye(count, dtype=d.dtype, device=d.device).reshape(-1, *d.shape[1:])
        root = _inverse_root(rows(self.form.send(weights, units, site)))
        turned = self.strength * rows(d) @ root.to(d.dtype)
        return self.form.send(weights, turned.reshape(d.shape), site)

    def correlate(self, weights: Weights, d: Tensor, h: Tensor, center: bool) -> Weights:
        return self.form.correlate(weights, d, h, center)

    def decay(self, weights: Weights, source: Shape, site: Shape) -> Weights:
        return self.form.decay(weights, source, site)

    def macs(self, source: Shape, site: Shape) -> int:
        return self.form.macs(source, site)

    def macs_per_pass(self, source: Shape, site: Shape) -> int:
        units, features = math.prod(source), math.prod(site)
        gram, steps = units**2 * features, 3 * STEPS * units**3
        return self.form.macs(source, site) * units + gram + steps

    def bytes(self, source: Shape, site: Shape) -> int:
        return self.form.bytes(source, site)


def _inverse_root(B: Tensor) -> Tensor:
    """(B B^T)^(-1/2), `[C, C]`, of `B: [C, n]`, as ten steps leave it; zero for B = 0."""
    wide = B.to(torch.promote_types(B.dtype, torch.float32))
    gram = wide @ wide.t()
    total = gram.trace()
    scale = torch.where(total > 0, total, 1.0)
    gram = gram / scale
    root = torch.eye(len(gram), dtype=gram.dtype, device=gram.device) / scale.sqrt()
    unit = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for _ in range(STEPS):
        step = 1.5 * unit - 0.5 * gram
        root = step @ root
        gram = step @ gram @ step
    return root
