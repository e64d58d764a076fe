"""Dense feedback: one weight from every source unit to every feature of the site."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from feedbackward.errors import AttachError
from feedbackward.operators.base import Operator, Shape, Weights
from feedbackward.operators.options import check_init, check_scale

INITS = ("zeros", "kaiming_uniform", "scaled_normal", "scaled_uniform")


@dataclass(frozen=True)
class Dense(Operator):
    r"""A weight from every source unit to every feature: `B: [C, *site]`.

    .. math:: \delta h_{mj} = \sum_c d_{mc} B_{cj}

    init: the initial weights, for a site with n features. `"zeros"`; `"kaiming_uniform"`: U(-b, b) with b = sqrt(6 / n), as in
        the DKP authors' CIFAR-10 net; `"scaled_normal"`: N(0, 1) / sqrt(n); or `"scaled_uniform"`: U(-1, 1) / sqrt(n). The last
        three give a signal whose norm does not depend on the width of the site. `"identity"`: the error itself, where source and site
        have the same units: along a residual stream, or from a layer's output to its steps.
    scale: a factor on the initial weights.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.DKP(operator=fb.Dense("zeros")), example=x)
        >>> nn.functional.cross_entropy(learner(x), y).backward()
        >>> [tuple(B.grad.shape) for B in learner.feedback.parameters()]
        [(3, 8)]
    """

    init: str = "kaiming_uniform"
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_init(self.init, (*INITS, "identity"))
        check_scale(self.scale)

    def fit(self, source: Shape, site: Shape, seed: int) -> Operator:
        if self.init == "identity" and source != site:
            raise AttachError(
                f"identity feedback needs a source and a site of one shape, not {list(source)} and {list(site)}: choose another init, "
                "or an error_at whose output has the site's shape."
            )
        return self

    def create(self, source: Shape, site: Shape, generator: torch.Generator) -> Weights:
        if self.init == "identity":
            units = math.prod(source)
            return (torch.eye(units).reshape(units, *site).mul_(self.scale),)
        B = draw(self.init, (math.prod(source), *site), math.prod(site), generator)
        return (B.mul_(self.scale),)

    def send(self, weights: Weights, d: Tensor, site: Shape) -> Tensor:
        (B,) = weights
        if _channels_last(B):
            last = (*site[1:], site[0])
            return (rows(d) @ rows(B.movedim(1, -1))).unflatten(1, last).movedim(-1, 1)
        return (rows(d) @ rows(B)).reshape(len(d), *site)

    def correlate(self, weights: Weights, d: Tensor, h: Tensor, center: bool) -> Weights:
        moved = _channels_last(weights[0])
        if moved:
            h = h.movedim(1, -1)
        grad = outer(rows(d), rows(h), center)
        grad = grad.reshape(len(grad), *h.shape[1:])
        return (grad.movedim(-1, 1) if moved else grad,)

    def dense(self, weights: Weights, source: Shape, site: Shape) -> Tensor:
        (B,) = weights
        return rows(B.movedim(1, -1) if _channels_last(B) else B)

    def gram_macs(self, source: Shape, site: Shape) -> int:
        return math.prod(source) ** 2 * math.prod(site)

    def decay(self, weights: Weights, source: Shape, site: Shape) -> Weights:
        return weights

    def macs(self, source: Shape, site: Shape) -> int:
        return math.prod(source) * math.prod(site)

    def bytes(self, source: Shape, site: Shape) -> int:
        return 4 * math.prod(source) * math.prod(site)


def draw(init: str, shape: Shape, width: int, generator: torch.Generator) -> Tensor:
    """Initial weights of a shape, by one of `INITS` with `width` for its n."""
    B = torch.zeros(shape)
    root = math.sqrt(width)
    if init == "kaiming_uniform":
        B.uniform_(-math.sqrt(6) / root, math.sqrt(6) / root, generator=generator)
    elif init == "scaled_normal":
        B.normal_(generator=generator).div_(root)
    elif init == "scaled_uniform":
        B.uniform_(-1.0, 1.0, generator=generator).div_(root)
    return B


def outer(d: Tensor, h: Tensor, center: bool) -> Tensor:
    """`d^T h` of rows `d: [M, C]` and `h: [M, n]`; centred `d^T (h - mean h)`."""
    if center:
        # the same as centring h, which is larger
        d = d - d.mean(0)
    return d.t() @ h


def rows(t: Tensor) -> Tensor:
    """One row per item of the first dimension; also of a tensor [M]."""
    return t if t.dim() == 2 else t.reshape(len(t), -1)


def _channels_last(B: Tensor) -> bool:
    """Whether `B` is laid out channels-last, so that flattening in that order copies nothing."""
    if B.dim() not in (4, 5) or B.is_contiguous():
        return False
    return B.is_contiguous(
        memory_format=torch.channels_last if B.dim() == 4 else torch.channels_last_3d
    )
