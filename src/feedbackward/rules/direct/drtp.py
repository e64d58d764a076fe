"""Direct random target projection."""

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
class DRTP(Rule):
    r"""Direct random target projection: DFA that sends the one-hot target in place of the error.

    .. math:: \delta h_l = \tfrac1N\, y\, B_l, \qquad B_l\ \text{fixed},\quad y: [N, C]\ \text{one-hot},\ B_l: [C, n_l]

    The signals need no error, so a layer may be updated before the next one has run (the `eager` schedule). They never
    vanish, whatever the loss is. Rates must therefore be smaller than DFA's, and should decay.

    Call `learner.target(y)` before every forward pass. The signals do not come from the loss, so give a factor on the loss
    (1/k for k accumulated batches) in `learner.target(y, scale=...)` as well. A label outside the classes (-100) sends nothing,
    and N counts all rows.

    operator: the form of the feedback weights, and their initial values.

    Frenkel, Lefebvre & Bol, "Learning without feedback: Fixed random learning signals allow for feedforward training of
    deep neural networks", Frontiers in Neuroscience 15, 2021 (arXiv:1909.01311). The authors' code adds `+ y B`, as
    here; the sign does not matter, because `B` is symmetric around zero. Their code draws `B` by `kaiming_uniform`, trains
    with sigmoid outputs and binary cross-entropy, and does not divide by N. We divide, so that the scale is that of a mean loss.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.DRTP(), example=x)
        >>> learner.target(y)  # before every forward pass
        >>> nn.functional.cross_entropy(learner(x), y).backward()
        >>> [tuple(B.shape) for B in learner.feedback.buffers()]
        [(3, 8)]
    """

    operator: Operator = Dense()

    name = "drtp"
    label = "DRTP"
    paper = "Frenkel et al. 2021"
    needs = "target"
    linear = False
    unlocked = "update"

    def __post_init__(self) -> None:
        refuse_zeros(self.label, self.operator)

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        return star(sites, source, self.operator)

    def message(
        self, edge: Edge, d: Tensor, target: Tensor | None, activity: Tensor | None
    ) -> Tensor:
        assert target is not None
        return target / len(target)
