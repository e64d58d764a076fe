"""Direct feedback alignment with sparse connections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from feedbackward.activity import Site, Source
from feedbackward.graph import Graph
from feedbackward.operators import Sparse
from feedbackward.rule import Rule, refuse_zeros
from feedbackward.topologies import star


@dataclass(frozen=True)
class SparseDFA(Rule):
    r"""Sparse DFA: every hidden unit listens to the errors of s classes, of one by default.

    .. math:: \delta h_{l,i} = \sum_{k=1}^{s} b_{l,ik}\, e_{c_k(i)}, \qquad
        b \sim U(-\tfrac1q, \tfrac1q),\ q = \sqrt{n_l / \sqrt{C s}}

    The classes `c_k(i)` are random, fixed and balanced: all have about the same number of listeners.

    nonzeros: s, the classes that a unit listens to.
    scale: a factor on the initial weights.

    Crafton, Parihar, Gebhardt & Raychowdhury, "Direct Feedback Alignment With Sparse Connections for Local Learning", Frontiers in
    Neuroscience 13:525, 2019 (arXiv:1903.02083). The scale is that of the authors' code. On ImageNet their
    convolutions are pre-trained, and only fully connected layers learn by the rule. Here all sites do, unless you use
    :class:`Mixed` with `Frozen` or `BP`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.rules.SparseDFA(nonzeros=1), example=x)
        >>> nn.functional.cross_entropy(learner(x), y).backward()
        >>> values, index = learner.weights_of(learner.graph.edges[0])
        >>> tuple(values.shape), tuple(index.shape)
        ((1, 8), (1, 8))
    """

    nonzeros: int = 1
    scale: float = 1.0

    name = "sparse_dfa"
    label = "Sparse DFA"
    paper = "Crafton et al. 2019"
    unlocked = "backward"

    def __post_init__(self) -> None:
        refuse_zeros(self.label, self)

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        return star(sites, source, Sparse(self.nonzeros, self.scale))
