"""Local error signals: prediction and similarity matching."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from feedbackward.activity import Site, Source
from feedbackward.errors import AttachError
from feedbackward.graph import Graph
from feedbackward.rule import Rule
from feedbackward.rules.local.heads import CONVS, Reader, count_classes, local_losses, pooled_space


@dataclass(frozen=True)
class PredSim(Rule):
    r"""Predsim: every segment is trained by a local classifier and by how like its activities are within a class.

    .. math::
        L_l = (1 - \beta)\, \mathrm{CE}(\mathrm{pool}(h_l)\, D_l^\top, y) +
            \beta\, \frac{1}{N^2} \lVert S(A_l h_l) - S(Y) \rVert^2, \qquad
        S(X)_{ij} = \cos(x_i - \bar x_i,\, x_j - \bar x_j)

    `Y: [N, C]` one-hot. :math:`A_l` is a 3x3 convolution of as many channels (a matrix, for vectors); before S a map is
    reduced to the standard deviation of each channel over space. :math:`\bar x_i` is the mean over the features of sample i.
    A vector that a flatten made of a map is read as the map. :math:`D_l` starts at zero; both are trained by the same loss.
    No error travels between segments. The part above the last site learns by the network's own loss.

    Call `learner.target(y)` with class indices before every forward pass; what multiplies the loss goes into its `scale`.
    The similarity needs batches of many samples, and of tokens with targets of their own all `N T` of them.

    similarity: :math:`\beta`. With 0 the rule is layer-wise classification, with 1 similarity matching alone. The published
        value is 0.99, for maps of 128 channels and more and hundreds of epochs. In two epochs on the small CNN, whose maps have
        32 channels, it reached half of what 0.5 did (bench/results/low_rules.md).
    features: the most features that the classifier reads; maps are averaged down to it.
    bio: the form without weight transport. There is no :math:`A_l`; pooled activities are compared with fixed random
        projections :math:`Y P_l`, `P_l: [C, targets]`; the classifier predicts which of them are positive, with a
        binary cross-entropy, and sends its error through a fixed random matrix of :math:`D_l`'s shape.
    targets: of the bio form.

    Nokland & Eidnes, "Training Neural Networks with Local Error Signals", ICML 2019 (arXiv:1901.06656), in the form of the
    authors' code, which trains by Adam at 5e-4 and puts dropout after every activation.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import torch.nn.functional as F
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.rules.PredSim(), example=x)
        >>> learner.target(y)
        >>> F.cross_entropy(learner(x), y).backward()
        >>> all(p.grad is not None for p in learner.parameters())
        True
    """

    similarity: float = 0.5
    features: int = 4096
    bio: bool = False
    targets: int = 128

    name = "predsim"
    label = "predsim"
    paper = "Nokland & Eidnes 2019"
    needs = "target"
    linear = False
    unlocked = "update"
    learned = True

    def __post_init__(self) -> None:
        if not 0 <= self.similarity <= 1 or self.features < 1 or self.targets < 1:
            raise AttachError(
                f"{self.label} needs 0 <= similarity <= 1, features >= 1 and targets >= 1, got {self}."
            )

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        return local_losses(self, sites, source)

    def auxiliary(self, site: Site, source: Source) -> nn.Module:
        classes = count_classes(self.label, site, source)
        space = pooled_space(site.map, self.features) if site.map else ()
        return _Head(Reader(site, source, space), classes, self.targets if self.bio else 0)

    def local_loss(self, output: _Views, target: Tensor) -> Tensor:
        y = target.flatten()
        classes = (
            len(output.projection) if output.projection is not None else output.scores.shape[1]
        )
        wanted = F.one_hot(y, classes).to(output.scores.dtype)
        if output.projection is None:
            prediction = F.cross_entropy(output.scores, y)
        else:
            wanted = wanted @ output.projection
            signs = (wanted > 0).to(wanted.dtype)
            prediction = F.binary_cross_entropy_with_logits(output.scores, signs)
        difference = F.mse_loss(_similarity(output.compared), _similarity(wanted))
        return (1 - self.similarity) * prediction + self.similarity * difference


class _Views(NamedTuple):
    """What a site's activity looks like to its loss: `compared [N, ...]`, `scores [N, C or targets]`."""

    compared: Tensor
    scores: Tensor
    projection: Tensor | None


class _Head(nn.Module):
    """The layers A and D of a site; of the bio form (`targets` above 0) D with its fixed feedback, and the projection."""

    back: Tensor
    projection: Tensor

    def __init__(self, reader: Reader, classes: int, targets: int) -> None:
        super().__init__()
        self.reader, self.bio = reader, targets > 0
        width, channels, space = reader.width, reader.channels, reader.space
        self.decoder = nn.Linear(width, targets or classes)
        if targets:
            bound = 1 / math.sqrt(width)
            self.register_buffer("back", torch.empty(targets, width).uniform_(-bound, bound))
            bound = 1 / math.sqrt(classes)
            self.register_buffer(
                "projection", torch.empty(classes, targets).uniform_(-bound, bound)
            )
        elif space:
            conv = CONVS[len(space) - 1]
            self.layer: nn.Module = conv(channels, channels, 3, padding=1, bias=False)
        else:
            self.layer = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.decoder.weight)

    def forward(self, h: Tensor) -> _Views:
        z = self.reader(h)
        seen = self.reader.as_map(h) if self.reader.space else z
        if not self.bio:
            return _Views(self.layer(seen), self.decoder(z), None)
        # the values of D, and the gradient of the fixed matrix
        scores = self.decoder(z.detach()) + (z - z.detach()) @ self.back.t()
        compared = self.reader.pooled(seen) if self.reader.space else z
        return _Views(compared, scores, self.projection)


def _similarity(x: Tensor) -> Tensor:
    """S of the samples `x: [N, ...]`, `[N, N]`."""
    if x.dim() > 2 and x.shape[1] > 3 and x[0, 0].numel() > 1:
        x = x.flatten(2).std(2)
    x = x.flatten(1)
    x = x - x.mean(1, keepdim=True)
    x = x / (1e-8 + torch.linalg.vector_norm(x, dim=1, keepdim=True))
    return (x @ x.t()).clamp(-1, 1)
