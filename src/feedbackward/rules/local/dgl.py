"""Decoupled greedy learning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from feedbackward.errors import AttachError
from feedbackward.graph import Graph, Site, Source
from feedbackward.rule import Rule
from feedbackward.rules.local.heads import count_classes, local_losses, per_token


@dataclass(frozen=True)
class DGL(Rule):
    r"""Decoupled greedy learning: a local loss, from an auxiliary classifier, trains every segment.

    .. math:: \delta h_l = \partial\, \mathrm{CE}(A_l(h_l), y) / \partial h_l, \qquad A_l\ \text{trained by the same loss}

    No error travels between segments, so the order in which they are updated changes nothing. `A_l` is a small form of the
    paper's "MLP-SR". Maps are averaged down to a quarter of their side, pass `convs` 1x1 convolutions with batch norm and
    ReLU, are averaged to 2 x 2, and go through a hidden layer with batch norm to the classes. Vectors (flattened maps too)
    and tokens go straight to the hidden layer. The part above the last site learns by the network's own loss.

    Call `learner.target(y)` with class indices before every forward pass. Give a factor on the loss in its `scale` as well.

    hidden: width of the auxiliary hidden layer, at most the classifier's input; 0 for a linear classifier.
    convs: 1x1 convolutions of the auxiliary classifier of maps.

    Belilovsky, Eickenberg & Oyallon, "Decoupled Greedy Learning of CNNs", ICML 2020 (arXiv:1901.08164). The authors use three
    1x1 convolutions and a three-layer MLP per block of several layers.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import torch.nn.functional as F
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.DGL(), example=x)
        >>> learner.target(y)
        >>> F.cross_entropy(learner(x), y).backward()
        >>> all(p.grad is not None for p in learner.parameters())
        True
    """

    hidden: int = 128
    convs: int = 1

    name = "dgl"
    label = "DGL"
    paper = "Belilovsky et al. 2020"
    needs = "target"
    linear = False
    unlocked = "update"
    learned = True

    def __post_init__(self) -> None:
        if self.hidden < 0 or self.convs < 0:
            raise AttachError(
                f"DGL needs hidden >= 0 and convs >= 0, got {self.hidden} and {self.convs}."
            )

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        return local_losses(self, sites, source)

    def auxiliary(self, site: Site, source: Source) -> nn.Module:
        classes = count_classes(self.label, site, source)
        if per_token(site, source):
            return _Head(site.shape[-1], self.hidden, classes, tokens=True)
        # a flattened map keeps its places in a dense head, which did better than one that averages them
        if site.map == site.shape:
            return _maps(site.map, self.convs, self.hidden, classes)
        return nn.Sequential(nn.Flatten(), _Head(math.prod(site.shape), self.hidden, classes))

    def local_loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.flatten(0, -2), target.flatten())


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
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[dims - 1]
    layers: list[nn.Module] = [pool([max(1, n // 4) for n in space])]  # type: ignore[arg-type]
    for _ in range(convs):
        layers += [conv(channels, channels, 1, bias=False), norm(channels), nn.ReLU()]
    small = [min(2, n) for n in space]
    layers += [pool(small), nn.Flatten()]  # type: ignore[arg-type]
    return nn.Sequential(*layers, _Head(channels * math.prod(small), hidden, classes))
