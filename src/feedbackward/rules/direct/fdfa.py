"""Forward direct feedback alignment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from feedbackward.graph import Graph, Site, Source
from feedbackward.operators import Dense, Operator
from feedbackward.rule import Rule
from feedbackward.topologies import star

if TYPE_CHECKING:
    from feedbackward.engine.phase import Phase


@dataclass(frozen=True)
class FDFA(Rule):
    r"""Forward direct feedback alignment: feedback that averages forward-mode estimates of the Jacobians.

    .. math::
        \delta h_l = e\, B_l, \qquad \nabla B_l = B_l - \hat J_l, \qquad
        \hat J_l = \tfrac1M\, d^\top u_l,\quad d = \sum_k J_k u_k,\quad u_l: [M, n_l] \sim \mathcal N(0, 1)

    :math:`J_l = \partial a_L / \partial h_l: [C, n_l]` is the Jacobian of each sample. One forward-mode pass moves all
    activities at once. The cross terms :math:`J_k u_k u_l^\top` have mean zero, so :math:`E[\hat J_l]` is the batch-mean
    Jacobian. A plain SGD step with the rate :math:`\alpha` is :math:`B \leftarrow (1-\alpha) B + \alpha \hat J`. The variance of
    an entry of the estimate is about :math:`\sum_k \lVert J_k \rVert^2 / M` (one row of each); low rates average it away.
    Neither error nor label is used.

    Call `learner.feedback_step(x)` after every backward pass, before the optimizers step. `B` starts at zero, so hidden layers
    get no signal in the first step. Do not scale the gradient of `B` with the loss.

    operator: the form of the feedback weights, which must be learnable, and their initial values.

    Bacho & Chu, "Low-variance forward gradients using direct feedback alignment and momentum", Neural Networks 169, 2024
    (arXiv:2212.07282). The authors' code starts `B` at zero, updates W and B by Adam (1e-4 each) and normalises every layer.
    It computes the tangents in the training pass itself. Here they have a pass of their own, with other dropout masks.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.rules.FDFA(), example=x)
        >>> nn.functional.cross_entropy(learner(x), y).backward()
        >>> learner.feedback_step(x)  # gives B its gradient; before the optimizer steps
        >>> all(B.grad is not None for B in learner.feedback.parameters())
        True
    """

    operator: Operator = Dense("zeros")

    name = "fdfa"
    label = "FDFA"
    paper = "Bacho & Chu 2024"
    in_phase = True
    unlocked = "backward"
    learned = True

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        return star(sites, source, self.operator)

    def feedback_step(self, phase: Phase) -> None:
        for edge, moves, noise in phase.perturbed():
            with torch.no_grad(), torch.autocast(moves.device.type, enabled=False):
                weights, operator = phase.weights(edge), edge.operator
                J = operator.correlate(weights, moves / len(moves), noise, center=False)
                own = operator.decay(weights, edge.source_shape, edge.site_shape)
                phase.give(edge, tuple(b - j for b, j in zip(own, J, strict=False)))
