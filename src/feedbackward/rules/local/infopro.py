"""Local learning that keeps what the segments above need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from feedbackward.activity import ModelInput, Site, SiteInContext, Source
from feedbackward.errors import AttachError
from feedbackward.graph import Graph, Local
from feedbackward.rule import Rule
from feedbackward.rules.local.heads import CONVS, NORMS, classifier

ENLARGED = ("linear", "bilinear", "trilinear")


@dataclass(frozen=True)
class InfoPro(Rule):
    r"""InfoPro: every segment is trained by a local classifier, and so that the network's input can be made from its activity.

    .. math::
        L_l = a_l\, \mathrm{CE}(A_l(h_l), y) + (1 - a_l)\, \tfrac{1}{N d} \lVert D_l(h_l) - x \rVert^2, \qquad
        a_l = a_0 + (a_{K-1} - a_0) \tfrac{l}{K - 1}, \quad l = 0 \ldots K - 1

    `x: [N, d]`. A segment that is trained to classify alone drops what the segments above could have used; the reconstruction
    bounds how much of the input the activity tells. :math:`A_l` is the auxiliary classifier of :class:`DGL`. :math:`D_l` enlarges
    a map to the space of the input by interpolation, and applies a 3x3 convolution to `width` channels, batch norm, ReLU and
    another convolution. Of vectors and tokens it is a hidden layer of `hidden` ReLU units. Both are trained by the same loss. No
    error travels between segments. The part above the last site learns by the network's own loss.

    Call `learner.target(y)` with class indices before every forward pass; what multiplies the loss goes into its `scale`. The
    model needs one floating-point input. Inputs should be normalized: the size of their numbers weighs the reconstruction.

    first, last: :math:`a` at the lowest and at the last site.
    hidden, convs: of the classifier, as in :class:`DGL`.
    width: channels within the decoder.

    Wang, Ni, Song, Yang & Huang, "Revisiting Locally Supervised Learning: an Alternative to End-to-end Training", ICLR 2021
    (arXiv:2101.10832). The authors cut a network into few segments (2 to 16) and search both weights for each number of
    them; they take a contrastive loss or cross-entropy, another classifier, and binary cross-entropy between images in
    [0, 1] and a sigmoid, which any other input does not allow. Inferred: squares instead, vectors and tokens, and the
    weights, which were not searched.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import torch.nn.functional as F
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.rules.InfoPro(), example=x)
        >>> learner.target(y)
        >>> F.cross_entropy(learner(x), y).backward()
        >>> all(p.grad is not None for p in learner.parameters())
        True
    """

    first: float = 0.3
    last: float = 0.9
    hidden: int = 128
    convs: int = 1
    width: int = 12

    name = "infopro"
    label = "InfoPro"
    paper = "Wang et al. 2021"
    feeds = SiteInContext
    needs = "target"
    linear = False
    unlocked = "update"
    learned = True

    def __post_init__(self) -> None:
        shares = 0 <= self.first <= 1 and 0 <= self.last <= 1
        if not shares or min(self.hidden, self.convs) < 0 or self.width < 1:
            raise AttachError(
                f"{self.label} needs first and last from 0 to 1, hidden >= 0, convs >= 0 and width >= 1, got {self}."
            )

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        assert isinstance(sites[0], SiteInContext)
        into = sites[0].input
        if into is None:
            raise AttachError(
                f"{self.label} reconstructs the model's one floating-point input; this model has none, or several. Use DGL, which "
                "classifies alone."
            )
        local = []
        for place, site in enumerate(sites):
            share = self.first + (self.last - self.first) * place / max(1, len(sites) - 1)
            network = partial(self.auxiliary, site, source, into)
            loss = partial(self.local_loss, share)
            local.append(Local(source, site, network, loss, reads=into))
        return Graph((into, *sites), local=tuple(local))

    def auxiliary(self, site: Site, source: Source, into: ModelInput) -> nn.Module:
        head = classifier(self.label, site, source, self.hidden, self.convs)
        if site.map and len(site.map) == len(into.map):
            return _Views(head, _MapDecoder(site.map, into.map, self.width))
        return _Views(head, _Decoder(site, into, self.hidden))

    def local_loss(self, share: float, output: _Seen, target: Tensor) -> Tensor:
        scores = output.scores.flatten(0, -2)
        prediction = F.cross_entropy(scores, target.flatten())
        return share * prediction + (1 - share) * F.mse_loss(output.made, output.wanted)


class _Seen(NamedTuple):
    """The class scores, and the input as the decoder makes it and as it is."""

    scores: Tensor
    made: Tensor
    wanted: Tensor


class _Views(nn.Module):
    def __init__(self, head: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.head, self.decoder = head, decoder

    def forward(self, h: Tensor, x: Tensor) -> _Seen:
        return _Seen(self.head(h), self.decoder(h), x)


class _MapDecoder(nn.Module):
    """From a map, which a flatten may have made a vector, to a map."""

    def __init__(self, site: tuple[int, ...], into: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.site, self.space, dims = site, into[1:], len(into) - 1
        conv = CONVS[dims - 1]
        norm = NORMS[dims - 1]
        self.mode = ENLARGED[dims - 1]
        self.steps = nn.Sequential(
            conv(site[0], width, 3, padding=1),
            norm(width),
            nn.ReLU(),
            conv(width, into[0], 3, padding=1),
        )

    def forward(self, h: Tensor) -> Tensor:
        h = h.reshape(-1, *self.site)
        made: Tensor = self.steps(F.interpolate(h, self.space, mode=self.mode, align_corners=True))
        return made


class _Decoder(nn.Module):
    """From vectors, or tokens that the input has too, to what there is of the input."""

    def __init__(self, site: Site, into: ModelInput, hidden: int) -> None:
        super().__init__()
        kept = site.tokens
        same = kept == into.tokens and site.shape[:kept] == into.shape[:kept]
        self.kept = 1 + (kept if same else 0)
        self.shape = into.shape[self.kept - 1 :]
        entering, leaving = math.prod(site.shape[self.kept - 1 :]), math.prod(self.shape)
        middle = [nn.Linear(entering, hidden), nn.ReLU()] if hidden else []
        self.steps = nn.Sequential(*middle, nn.Linear(hidden or entering, leaving))

    def forward(self, h: Tensor) -> Tensor:
        made: Tensor = self.steps(h.flatten(self.kept))
        return made.unflatten(self.kept, self.shape)
