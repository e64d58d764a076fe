"""Frozen features: the control that says whether hidden layers were trained at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from feedbackward.activity import Site, Source
from feedbackward.graph import Graph
from feedbackward.rule import Rule


@dataclass(frozen=True)
class Frozen(Rule):
    r"""Hidden layers stay as they were initialised; only what lies above the last site learns.

    The network is cut at every site and nothing is sent. So no hidden parameter (weights, biases, affine
    parameters of norms) gets a gradient, and `grad` stays None. Running statistics of norms still update. A rule
    that does not beat this control has not trained its hidden layers
    (Launay et al. 2019 found DFA's convolutions equal to it).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.Frozen(), example=x)
        >>> nn.functional.cross_entropy(learner(x), y).backward()
        >>> [name for name, p in model.named_parameters() if p.grad is not None]
        ['2.weight', '2.bias']
    """

    name = "frozen"
    label = "Frozen"
    paper = "control"
    needs = "nothing"
    unlocked = "forward"

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        return Graph(tuple(sites))
