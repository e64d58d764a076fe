"""Counter-current learning."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from feedbackward.activity import Site, Source
from feedbackward.errors import AttachError
from feedbackward.graph import Graph, Local
from feedbackward.rule import Rule
from feedbackward.rules.local.heads import CONVS, Reader, count_classes

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": F.elu,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True)
class CCL(Rule):
    r"""Counter-current learning: a feedback net runs from the classes down, and each segment is drawn to the feedback of its class.

    .. math::
        C_K = f(I\, Q_K), \qquad C_l = f(\mathrm{sg}(C_{l+1})\, Q_l) : [C, n_l], \qquad
        L_l = \frac{1}{N C} \lVert \hat H_l \hat C_l^\top - Y \rVert^2
            + \gamma \left( \frac{1}{N^2} \lVert \hat H_l \hat H_l^\top - I \rVert^2
            + \frac{1}{C^2} \lVert \hat C_l \hat C_l^\top - I \rVert^2 \right)

    Y is one-hot, `[N, C]`, sg stops gradients, and a hat divides each row by its norm. The feedback net mirrors the sites
    from the last (K) to the first; its batch is the C classes, whatever the samples are. From vector to vector
    :math:`Q_l` is a matrix, between maps a 3x3 convolution after an enlargement to the site's space. The layers and :math:`Q_l` both
    descend :math:`L_l`. No weight is transported, and no error travels between segments. What lies above the last site learns
    by the network's own loss.

    Call `learner.target(y)` with class indices before every forward pass; what multiplies the loss goes into its `scale`.
    Tokens with targets of their own are samples; others are averaged.

    activation: f: "elu", as the authors', "relu", "leaky_relu" or "tanh".
    cosine: with False the loss is that of the paper, and of the authors' code for networks without convolutions:
        :math:`L_l = 256 / n_l \cdot \lVert H_l C_l^\top - Y \rVert^2 / (N C)`.
    spread: :math:`\gamma`, of the terms that push samples apart, and classes; with cosines only.

    Kao & Hariharan, "Counter-Current Learning: A Biologically Plausible Dual Network Approach for Deep Learning", NeurIPS 2024
    (arXiv:2409.19841). The default loss is that of the authors' code for convolutional nets. The authors train both nets by
    SGD at a rate of 1 with gradients clipped to a norm of 0.3, centred gradients and ELU in the network itself. This matters:
    with ReLU in the network and SGD without clipping, activities shrank until the top learned no more. Left out:
    samples that are classified well already have no loss in their code. Of maps, every sample pushes every other one away
    here as there, one of its own class too.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import torch.nn.functional as F
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.rules.CCL(), example=x)
        >>> learner.target(y)
        >>> F.cross_entropy(learner(x), y).backward()
        >>> all(p.grad is not None for p in learner.parameters())
        True
    """

    activation: str = "elu"
    cosine: bool = True
    spread: float = 0.5

    name = "ccl"
    label = "CCL"
    paper = "Kao & Hariharan 2024"
    needs = "target"
    linear = False
    unlocked = "update"
    learned = True

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise AttachError(
                f"{self.label} has no activation {self.activation!r}: choose one of {', '.join(ACTIVATIONS)}."
            )
        if self.spread < 0:
            raise AttachError(f"{self.label} needs spread >= 0, got {self.spread}.")

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        local = []
        above: Site | None = None
        for site in reversed(sites):
            network = partial(self.mirror, site, source)
            local.append(Local(source, site, network, self.local_loss, above))
            above = site
        return Graph(tuple(sites), local=tuple(local))

    def mirror(self, site: Site, source: Source, above: _Mirror | None = None) -> nn.Module:
        """The layer of the feedback net that ends at the site."""
        classes = count_classes(self.label, site, source)
        reader = Reader(site, source, site.map[1:])
        shape = site.map or site.shape[site.tokens :]
        return _Mirror(reader, shape, above or _Classes(classes), ACTIVATIONS[self.activation])

    def local_loss(self, output: _Pair, target: Tensor) -> Tensor:
        h, c = output
        y = target.flatten()
        # by comparison, so that a label outside the classes (ignore_index) is none of them
        wanted = (y.unsqueeze(1) == torch.arange(len(c), device=y.device)).to(h.dtype)
        counted = wanted.sum(1, keepdim=True)
        if not self.cosine:
            return 256 / h.shape[1] * F.mse_loss((h * counted) @ c.t(), wanted)
        h, c = F.normalize(h) * counted, F.normalize(c)
        apart = F.mse_loss(h @ h.t(), torch.diag(counted.flatten()))
        apart = apart + F.mse_loss(c @ c.t(), torch.eye(len(c), dtype=c.dtype, device=c.device))
        return F.mse_loss(h @ c.t(), wanted) + self.spread * apart


class _Pair(NamedTuple):
    """What the loss of a site compares: its activities `[N, n]` and the feedback of the classes `[C, n]`."""

    activities: Tensor
    feedback: Tensor


class _Classes(nn.Module):
    """The top of the feedback net: a row for each class."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.shape: tuple[int, ...] = (classes,)

    def feedback(self, like: Tensor) -> Tensor:
        return torch.eye(self.shape[0], dtype=like.dtype, device=like.device)


class _Mirror(nn.Module):
    """A layer of the feedback net, from what the one above sends to the shape of a site."""

    def __init__(
        self,
        reader: Reader,
        shape: tuple[int, ...],
        above: _Mirror | _Classes,
        activation: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.reader, self.shape, self.activation = reader, shape, activation
        # no part of this layer: it belongs to the site above
        self._above = (above,)
        entering = above.shape
        self.maps = len(entering) == len(shape) > 1
        if self.maps:
            conv = CONVS[len(shape) - 2]
            self.layer: nn.Module = conv(entering[0], shape[0], 3, padding=1, bias=False)
        else:
            self.layer = nn.Linear(math.prod(entering), math.prod(shape), bias=False)

    def feedback(self, like: Tensor) -> Tensor:
        """`C_l: [C, *site]`, whose gradient is that of this layer's weights alone."""
        (above,) = self._above
        with torch.no_grad():
            c = above.feedback(like)
        c = F.interpolate(c, self.shape[1:]) if self.maps else c.flatten(1)
        return self.activation(self.layer(c)).reshape(-1, *self.shape)

    def forward(self, h: Tensor) -> _Pair:
        return _Pair(self.reader(h), self.feedback(h).flatten(1))
