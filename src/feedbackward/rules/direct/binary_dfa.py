"""Binary direct feedback alignment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from feedbackward.activity import Site, Source
from feedbackward.graph import Graph
from feedbackward.operators import Binary
from feedbackward.rule import Rule, refuse_zeros
from feedbackward.topologies import star


@dataclass(frozen=True)
class BinaryDFA(Rule):
    r"""BDFA: the feedback weights are random signs, so that a signal is made by additions alone.

    .. math:: \delta h_l = s_l\, e\, B_l, \qquad B_l \in \{-1, 1\}^{C \times n_l},\quad s_l = \sqrt{2 / n_l}

    scale: a factor on `s_l`. In hardware it is a shift if `s_l` is a power of two.

    Han & Yoo, "Efficient convolutional neural network training with direct feedback alignment", 2019 (arXiv:1901.01986; ICCV
    workshops 2019). In the paper, binary feedback serves the fully connected layers, and backprop trains the convolutions
    (:class:`CDFA` with `operator=Binary()`). This rule is DFA throughout. `s_l` gives signals of DFA's norm. The paper chooses
    it from statistics of the matrices, which we have not read.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.rules.BinaryDFA(), example=x)
        >>> nn.functional.cross_entropy(learner(x), y).backward()
        >>> learner.feedback_bytes  # 3 x 8 bits
        3
    """

    scale: float = 1.0

    name = "binary_dfa"
    label = "BDFA"
    paper = "Han & Yoo 2019"
    unlocked = "backward"

    def __post_init__(self) -> None:
        refuse_zeros(self.label, self)

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        return star(sites, source, Binary(self.scale))
