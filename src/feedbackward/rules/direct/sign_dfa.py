"""Direct feedback alignment with the sign of the error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from feedbackward.activity import Site, Source
from feedbackward.graph import Edge, Graph
from feedbackward.operators import Dense, Operator
from feedbackward.rule import Rule, refuse_zeros
from feedbackward.topologies import star


@dataclass(frozen=True)
class SignDFA(Rule):
    r"""sDFA: direct feedback alignment that sends the sign of the error only, one bit per output unit.

    .. math:: \delta h_l = \tfrac1M\, \mathrm{sign}(e)\, B_l, \qquad B_l\ \text{fixed},\quad e: [M, C],\ B_l: [C, n_l]

    M counts samples, or tokens where feedback is token-wise; an error of exactly zero (an ignored token) sends nothing.

    With class probabilities and one-hot targets, :math:`\mathrm{sign}(\hat y - y) = 1 - 2y` whatever the network answers. The
    signal is then a projection of the target, as in DRTP, and never vanishes. A factor on the loss (1/k for k accumulated
    batches, a sum in place of a mean) does not change it: scale the learning rate instead. fp16 autocast, which needs a loss
    scale, is refused.

    operator: the form of the feedback weights, and their initial values.

    Frenkel, Lefebvre & Bol, "Learning without feedback: Fixed random learning signals allow for feedforward training of
    deep neural networks", Frontiers in Neuroscience 15, 2021 (arXiv:1909.01311), where it is the step from DFA to DRTP. The
    authors' code draws `B` by `kaiming_uniform` and does not divide by M. We divide, so that the scale is that of a mean loss.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.rules.SignDFA(), example=x)
        >>> nn.functional.cross_entropy(learner(x), y).backward()
        >>> [tuple(B.shape) for B in learner.feedback.buffers()]
        [(3, 8)]
    """

    operator: Operator = Dense()

    name = "sign_dfa"
    label = "sDFA"
    paper = "Frenkel et al. 2021"
    linear = False
    unlocked = "backward"

    def __post_init__(self) -> None:
        refuse_zeros(self.label, self.operator)

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        return star(sites, source, self.operator)

    def message(
        self, edge: Edge, d: Tensor, target: Tensor | None, activity: Tensor | None
    ) -> Tensor:
        return d.sign() / len(d)
