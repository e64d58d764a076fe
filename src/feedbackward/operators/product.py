"""Layer-shaped feedback that is a product of two matrices of channels, the first fixed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from feedbackward.operators.base import Operator, Shape, Weights
from feedbackward.operators.layer import LayerShaped

PRODUCT_KINDS = ("random", "orthogonal", "identity")


@dataclass(frozen=True)
class Product(Operator):
    r"""A fixed and a learned matrix: the signal is :math:`(\delta a\, B) R`.

    `B: [g, c_out / g, m / g]` mixes channels at each position, inside each of the layer's g groups. `R` is layer-shaped, with
    `m = expand * c_out` channels in place of the layer's `c_out`.

    layer: the operator of the layer's own form; its `init` and `scale` are those of `R`.
    expand: m / c_out.
    kind: the fixed `B`. `"random"`: U(-b, b) with b = sqrt(3 g / m), so that E[B B^T] = 1. `"orthogonal"` (orthogonal rows) and
        `"identity"` have m = c_out.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> form = fb.operators.LayerForm.of(nn.Linear(8, 3))
        >>> layer = fb.operators.LayerShaped(form)
        >>> operator = fb.operators.Product(layer, expand=10, kind="random")
        >>> R, B = operator.create((3,), (8,), torch.Generator())
        >>> tuple(R.shape), tuple(B.shape)
        ((30, 8), (1, 3, 30))
    """

    parts = ("R", "B")
    sized = False

    layer: LayerShaped
    expand: int
    kind: str

    def create(self, source: Shape, site: Shape, generator: torch.Generator) -> Weights:
        (R,) = self._wide.create(source, site, generator)
        groups, out, mid = self._sizes
        B = torch.eye(out, mid).repeat(groups, 1, 1)
        if self.kind == "random":
            bound = math.sqrt(3 / mid)
            B.uniform_(-bound, bound, generator=generator)
        elif self.kind == "orthogonal":
            B = torch.linalg.qr(torch.randn(groups, out, mid, generator=generator).double())[
                0
            ].float()
        return R, B

    def send(self, weights: Weights, d: Tensor, site: Shape) -> Tensor:
        R, B = weights
        channels = d.unflatten(1, B.shape[:2])
        mixed = torch.einsum("mgo...,gok->mgk...", channels, B).flatten(1, 2)
        return self._wide.send((R,), mixed, site)

    def share(self, weights: Weights, grad: Tensor) -> Weights:
        """B^T times the gradient of the layer's weight."""
        R, B = weights
        return (self._weight(B.mT.to(grad.dtype) @ self._rows(grad), R.shape),)

    def product(self, weights: Weights) -> Tensor:
        """B R, of the shape of the layer's weight."""
        R, B = weights
        return self._weight(B @ self._rows(R), self.layer.form.shape)

    def macs(self, source: Shape, site: Shape) -> int:
        groups, out, _ = self._sizes
        places = math.prod(source) // (groups * out)
        return places * math.prod(self._sizes) + self._wide.macs(source, site)

    def bytes(self, source: Shape, site: Shape) -> int:
        return 4 * math.prod(self._sizes) + self._wide.bytes(source, site)

    @property
    def _sizes(self) -> tuple[int, int, int]:
        """Groups; output channels and channels between the factors of each."""
        form = self.layer.form
        out = form.shape[1] if form.transposed else form.shape[0] // form.groups
        return form.groups, out, self.expand * out

    @property
    def _wide(self) -> LayerShaped:
        """The layer whose weight is R."""
        form = self.layer.form
        axis = 1 if form.transposed else 0
        shape = tuple(self.expand * n if i == axis else n for i, n in enumerate(form.shape))
        return replace(self.layer, form=replace(form, shape=shape))

    def _rows(self, weight: Tensor) -> Tensor:
        """A weight as [g, output channels, all else]."""
        grouped = weight.unflatten(0, (self.layer.form.groups, -1))
        return (grouped.transpose(1, 2) if self.layer.form.transposed else grouped).flatten(2)

    def _weight(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of `_rows`."""
        if not self.layer.form.transposed:
            return rows.reshape(shape)
        return rows.unflatten(2, (-1, *shape[2:])).transpose(1, 2).reshape(shape)
