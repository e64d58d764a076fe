"""Forward direct feedback alignment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from feedbackward.activity import Site, Source
from feedbackward.errors import AttachError
from feedbackward.graph import Graph
from feedbackward.operators import Dense, Operator, Orthogonal
from feedbackward.rule import Rule
from feedbackward.topologies import star

if TYPE_CHECKING:
    from feedbackward.engine.phase import Phase


@dataclass(frozen=True)
class FDFA(Rule):
    r"""Forward direct feedback alignment: feedback that averages forward-mode estimates of the Jacobians.

    .. math::
        \delta h_l = \mathrm{strength} \cdot e\, (B_l B_l^\top)^{-1/2} B_l, \qquad
        \nabla B_l = \mathrm{rate} \cdot (B_l - \hat J_l), \qquad
        \hat J_l = \tfrac1M\, d^\top u_l,\quad d = \sum_k J_k u_k,\quad u_l: [M, n_l] \sim \mathcal N(0, 1)

    :math:`J_l = \partial a_L / \partial h_l: [C, n_l]` is the Jacobian of each sample. One forward-mode pass moves all
    activities at once. The cross terms :math:`J_k u_k u_l^\top` have mean zero, so :math:`E[\hat J_l]` is the batch-mean
    Jacobian. A plain SGD step with the rate :math:`\eta` is :math:`B \leftarrow (1-\alpha) B + \alpha \hat J`,
    :math:`\alpha = \eta \cdot \mathrm{rate}`; a momentum m makes :math:`\alpha` 1 / (1 - m) times as large. The variance of
    an entry of the estimate is about :math:`\sum_k \lVert J_k \rVert^2 / M` (one row of each), so the noise in B has a norm of
    :math:`\sqrt{\alpha n_l / 2M}` times that of the Jacobians: in maps it is far larger than B's mean unless :math:`\alpha` is
    small. What is sent depends on B's directions alone (:class:`Orthogonal`), so the noise turns the signals, but does not
    swell them. Neither error nor label is used.

    :meth:`published` is the authors' form, :math:`\delta h_l = e\, B_l` and `rate` 1. By SGD at one rate for W and B it fell
    below the frozen control on the small CNN (bench/results/low_rules.md).

    Call `learner.feedback_step(x)` after every backward pass, before the optimizers step. `B` starts at zero, so hidden layers
    get no signal in the first step. Do not scale the gradient of `B` with the loss.

    operator: the form of the feedback weights, which must be learnable, and their initial values.
    rate: how fast B follows the estimates, as a part of its learning rate.
    orthogonal: send by the orthogonal matrix next to `B`, not by `B`.
    strength: of orthogonal signals.

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
    rate: float = 0.1
    orthogonal: bool = True
    strength: float = 0.1

    name = "fdfa"
    label = "FDFA"
    paper = "Bacho & Chu 2024"
    in_phase = True
    unlocked = "backward"
    learned = True

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise AttachError(f"{self.label}'s rate is {self.rate}: it must be above 0, at most 1.")

    @classmethod
    def published(cls, **changes: Any) -> FDFA:
        """The authors' form: signals through `B` itself, and the whole of its gradient."""
        return replace(cls(rate=1.0, orthogonal=False), **changes)

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        form = Orthogonal(self.operator, self.strength) if self.orthogonal else self.operator
        return star(sites, source, form)

    def feedback_step(self, phase: Phase) -> None:
        for edge, moves, noise in phase.perturbed():
            with torch.no_grad(), torch.autocast(moves.device.type, enabled=False):
                weights, operator = phase.weights(edge), edge.operator
                J = operator.correlate(weights, moves / len(moves), noise, center=False)
                own = operator.decay(weights, edge.source_shape, edge.site_shape)
                phase.give(edge, tuple(self.rate * (b - j) for b, j in zip(own, J, strict=False)))
