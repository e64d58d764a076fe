"""Decoupled greedy learning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from feedbackward.activity import Site, Source
from feedbackward.errors import AttachError
from feedbackward.graph import Graph
from feedbackward.rule import Rule
from feedbackward.rules.local.heads import classifier, local_losses


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
        return classifier(self.label, site, source, self.hidden, self.convs)

    def local_loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.flatten(0, -2), target.flatten())
