"""What rules with local losses have in common: the sites' losses, and features of a size that a head can read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn import functional as F

from feedbackward.activity import Site, Source
from feedbackward.errors import AttachError
from feedbackward.graph import Graph, Local

# by the number of dimensions of space, less one
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)


class LocalRule(Protocol):
    """A rule that gives every site a network and a loss of its own."""

    def auxiliary(self, site: Site, source: Source) -> nn.Module:
        """The auxiliary network of a site."""

    def local_loss(self, output: Any, target: Tensor) -> Tensor:
        """The loss of the network's output. `target` is what `learner.target` got."""


def local_losses(rule: LocalRule, sites: Sequence[Site], source: Source) -> Graph:
    """The graph in which every site has a loss of its own."""
    local = (
        Local(source, site, partial(rule.auxiliary, site, source), rule.local_loss)
        for site in sites
    )
    return Graph(tuple(sites), local=tuple(local))


def per_token(site: Site, source: Source) -> bool:
    """Whether every token of the site has a target."""
    kept = source.tokens
    return (
        bool(kept)
        and not site.apart
        and kept == site.tokens
        and source.shape[:kept] == site.shape[:kept]
    )


def count_classes(label: str, site: Site, source: Source) -> int:
    """The classes that the source holds scores of. Raises AttachError where it holds none per sample or token."""
    if site.apart and source.tokens:
        raise AttachError(
            f"{label} classifies at site {site.name!r}, whose tokens are others than those of {source.name!r} (an encoder's, or a "
            "context), so none of them has a class: name sites in the decoder, or use a rule with feedback (DFA, DKP)."
        )
    if len(source.shape) != 1 + (source.tokens if per_token(site, source) else 0):
        raise AttachError(
            f"{label} classifies at site {site.name!r}, but the source {source.name!r} of shape {list(source.shape)} holds no class "
            "scores per sample or token: use a rule with feedback (DFA, DKP)."
        )
    return source.shape[-1]


def pooled_space(shape: Sequence[int], features: int) -> tuple[int, ...]:
    """The space of a map `[c, *space]`, its longest side halved until no more than so many features are left."""
    channels, *space = shape
    while channels * math.prod(space) > features and max(space) > 1:
        longest = space.index(max(space))
        space[longest] = -(-space[longest] // 2)
    return tuple(space)


class Reader(nn.Module):
    """The features of an activity that a head reads, one row per target: `[N, features]`.

    Maps are averaged down to `space`, if that is not empty. Tokens with targets of their own are rows; others are averaged.
    """

    def __init__(self, site: Site, source: Source, space: tuple[int, ...]) -> None:
        super().__init__()
        self.space, self.averaged = space, site.tokens if not per_token(site, source) else 0
        shape = site.map if space else site.shape[site.tokens :]
        self.kept, self.shape = len(shape), shape
        self.channels = shape[0]
        self.width = shape[0] * math.prod(space) if space else math.prod(shape)

    def forward(self, h: Tensor) -> Tensor:
        if self.space:
            return self.pooled(self.as_map(h)).flatten(1)
        if self.averaged:
            return h.flatten(1, self.averaged).mean(1).flatten(1)
        return h.flatten(-self.kept).flatten(0, -2)

    def as_map(self, h: Tensor) -> Tensor:
        """The activity of a map `[N, c, ...]`, which a flatten may have made a vector."""
        return h if h.dim() > 2 else h.unflatten(1, self.shape)

    def pooled(self, h: Tensor) -> Tensor:
        """A map `[N, c, ...]` averaged down."""
        if tuple(h.shape[2:]) == self.space:
            return h
        pools: list[Callable[..., Tensor]] = [
            F.adaptive_avg_pool1d,
            F.adaptive_avg_pool2d,
            F.adaptive_avg_pool3d,
        ]
        return pools[len(self.space) - 1](h, self.space)


def classifier(label: str, site: Site, source: Source, hidden: int, convs: int) -> nn.Module:
    """The auxiliary classifier of :class:`DGL`: `[N, C]` scores, or `[N, T, C]`. Raises as `count_classes` does."""
    classes = count_classes(label, site, source)
    if per_token(site, source):
        return _Head(site.shape[-1], hidden, classes, tokens=True)
    # a flattened map keeps its places in a dense head, which did better than one that averages them
    if site.map == site.shape:
        return _maps(site.map, convs, hidden, classes)
    return nn.Sequential(nn.Flatten(), _Head(math.prod(site.shape), hidden, classes))


class _Head(nn.Module):
    """A hidden layer with batch norm, and the classes."""

    def __init__(self, features: int, hidden: int, classes: int, tokens: bool = False) -> None:
        super().__init__()
        width = min(hidden, features)
        self.hidden = nn.Linear(features, width, bias=False) if width else nn.Identity()
        self.norm = (
            (nn.LayerNorm(width) if tokens else nn.BatchNorm1d(width)) if width else nn.Identity()
        )
        self.act = nn.ReLU() if width else nn.Identity()
        self.out = nn.Linear(width or features, classes)

    def forward(self, h: Tensor) -> Tensor:
        return self.out(self.act(self.norm(self.hidden(h))))


def _maps(shape: tuple[int, ...], convs: int, hidden: int, classes: int) -> nn.Module:
    channels, *space = shape
    dims = len(space)
    conv = CONVS[dims - 1]
    norm = NORMS[dims - 1]
    pool = POOLS[dims - 1]
    layers: list[nn.Module] = [pool([max(1, n // 4) for n in space])]  # type: ignore[arg-type]
    for _ in range(convs):
        layers += [conv(channels, channels, 1, bias=False), norm(channels), nn.ReLU()]
    small = [min(2, n) for n in space]
    layers += [pool(small), nn.Flatten()]  # type: ignore[arg-type]
    return nn.Sequential(*layers, _Head(channels * math.prod(small), hidden, classes))
