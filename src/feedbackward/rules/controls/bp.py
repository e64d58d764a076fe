"""Backpropagation: the control that every rule is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from feedbackward.activity import Site, Source
from feedbackward.graph import Graph
from feedbackward.rule import Rule


@dataclass(frozen=True)
class BP(Rule):
    r"""Backpropagation, :math:`\delta h_{l-1} = \delta a_l W_l`: autograd as it is, without cuts.

    Rumelhart, Hinton & Williams, "Learning representations by back-propagating errors", Nature 1986.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.BP(), example=x)
        >>> nn.functional.cross_entropy(learner(x), y).backward()
        >>> learner.graph.sites  # nothing is cut
        ()
    """

    name = "bp"
    label = "BP"
    paper = "Rumelhart et al. 1986"
    transport = True

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        return Graph()
