"""Direct feedback alignment with one matrix for all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from feedbackward.activity import Site, Source
from feedbackward.graph import Graph
from feedbackward.operators import Shared
from feedbackward.rule import Rule, refuse_zeros
from feedbackward.topologies import star


@dataclass(frozen=True)
class SharedDFA(Rule):
    r"""DFA with one random matrix, of which every layer takes as many columns as it has features.

    .. math:: R = e\, B, \qquad \delta h_l = R_{:, :n_l}, \qquad B: [C, m],\ B \sim U(-1, 1) / \sqrt{m},\ m = \max_l n_l

    One product serves all layers, and the feedback takes the memory of the widest one. The entries of a layer's signal have
    the same size whatever the width of the layer.

    scale: a factor on the initial weights.

    Launay, Poli & Krzakala, "Principled Training of Neural Networks with Direct Feedback Alignment", 2019 (arXiv:1906.04554);
    Launay, Poli, Boniface & Krzakala, "Direct Feedback Alignment Scales to Modern Deep Learning Tasks and Architectures",
    NeurIPS 2020 (arXiv:2006.12878). As in the authors' package TinyDFA, token dimensions are batch dimensions. The authors feed
    the outputs of blocks (`sites="blocks"`) or three sites per transformer block. They advise little dropout and, for
    transformers, Adam with a rate ten times smaller than backprop's.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> layers = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)]
        >>> model = nn.Sequential(*layers)
        >>> learner = fb.attach(model, fb.rules.SharedDFA(), example=x)
        >>> nn.functional.cross_entropy(learner(x), y).backward()
        >>> [tuple(B.shape) for B in learner.feedback.buffers()]  # one matrix, two sites
        [(3, 8)]
    """

    scale: float = 1.0

    name = "shared_dfa"
    label = "Shared DFA"
    paper = "Launay et al. 2019, 2020"
    unlocked = "backward"

    def __post_init__(self) -> None:
        refuse_zeros(self.label, self)

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        return star(sites, source, Shared(scale=self.scale))
