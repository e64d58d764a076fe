"""Direct feedback alignment with generated feedback, as pipelined on a chip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from feedbackward.activity import Site, Source
from feedbackward.graph import Graph
from feedbackward.operators import Seeded
from feedbackward.rule import Rule, refuse_zeros
from feedbackward.topologies import star


@dataclass(frozen=True)
class PDFA(Rule):
    r"""The rule of PDFA: DFA whose binary feedback is generated from a seed when it is needed, and never stored.

    .. math:: \delta h_l = s_l\, e\, B_l(\text{seed}), \qquad B_l \in \{-1, 1\}^{C \times n_l},\quad s_l = \sqrt{2 / n_l}

    In PDFA's pipeline a layer's update for one sample runs beside the forward pass of the next. This is not a part of the
    rule but a schedule, in which gradients are one step late: `fb.Delayed(learner, 1)`.

    scale: a factor on `s_l`.

    Han, Lee, Lee & Yoo, "A Low-Power Deep Neural Network Online Learning Processor for Real-Time Object Tracking Application",
    IEEE TCAS-I 66(5), 2019; DF-LNPU, JSSC 2021. The chip draws its feedback from a shift register; ours comes from a hash of seed,
    site and position. The binary values and their scale are inferred from the authors' BDFA (:class:`BinaryDFA`).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.rules.PDFA(), example=x)
        >>> nn.functional.cross_entropy(learner(x), y).backward()
        >>> learner.feedback_bytes
        0
    """

    scale: float = 1.0

    name = "pdfa"
    label = "PDFA"
    paper = "Han et al. 2019"
    unlocked = "backward"

    def __post_init__(self) -> None:
        refuse_zeros(self.label, self)

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        return star(sites, source, Seeded(self.scale, "binary"))
