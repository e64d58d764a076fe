"""Direct feedback alignment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from feedbackward.activity import Site, Source
from feedbackward.graph import Graph
from feedbackward.operators import Dense, Operator
from feedbackward.rule import refuse_zeros
from feedbackward.rules.direct.augmented import Augmented
from feedbackward.topologies import star


@dataclass(frozen=True)
class DFA(Augmented):
    r"""Direct feedback alignment: the output error reaches every site through a fixed random matrix.

    .. math:: \delta h_l = e\, B_l, \qquad B_l\ \text{fixed},\quad e: [N, C],\ B_l: [C, n_l]

    in place of backprop's :math:`e\, \partial a_L / \partial h_l`. All sites get their signals at once.

    operator: the form of the feedback weights, and their initial values.
    derivative: augmented DFA (Nakajima et al. 2022): the name of a function g (`"one"`, `"step"`, `"leaky"`, `"tanh"`,
        `"sigmoid"`, `"cos"`) that takes the place of the activations' derivative, :math:`\delta a_l = (e\, B_l) \odot g(a_l)`, where
        that is unknown or costly, as in physical networks. The sites are then the inputs of the activation modules
        (`nn.ReLU`, not `F.relu`), before a pool, and `sites` names these modules.

    Nokland, "Direct Feedback Alignment Provides Learning in Deep Neural Networks", NeurIPS 2016
    (arXiv:1609.01596). The paper draws B from a uniform distribution of width 1/sqrt(fan). The default
    here, `kaiming_uniform`, is that of the DKP authors' code for CIFAR-10. Nakajima et al., "Physical deep learning with
    biologically inspired training method: gradient-free approach for physical hardware", Nature Communications 13, 2022
    (arXiv:2204.13991); in short runs here, g = 1 was
    worse than :class:`Frozen` under tanh, for activities grew; it needs small rates.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import torch.nn.functional as F
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.DFA(), example=x)
        >>> F.cross_entropy(learner(x), y).backward()
        >>> [tuple(B.shape) for B in learner.feedback.buffers()]  # fixed feedback
        [(3, 8), (3, 8)]
    """

    operator: Operator = Dense()
    derivative: str | None = None

    name = "dfa"
    label = "DFA"
    paper = "Nokland 2016"
    unlocked = "backward"

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_zeros(self.label, self.operator)

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        return star(sites, source, self.operator)
