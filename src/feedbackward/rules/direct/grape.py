"""Gradient-aligned projected error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from feedbackward.activity import Site, Source
from feedbackward.graph import Graph
from feedbackward.operators import Dense, Operator, Shape, Weights
from feedbackward.rule import Rule, refuse_zeros
from feedbackward.topologies import star

if TYPE_CHECKING:
    from feedbackward.engine.phase import Phase


@dataclass(frozen=True)
class GrAPE(Rule):
    r"""GrAPE: direct feedback that turns towards forward-mode estimates of the Jacobians and keeps its norm.

    .. math::
        \delta h_l = e\, B_l, \qquad L_{align} = 1 - \tfrac1C \sum_c \cos(B_{lc}, \hat J_{lc}), \qquad
        \nabla B_{lc} = -\frac1C \Bigl(\frac{\hat J_{lc}}{\lVert \hat J_{lc} \rVert} - \cos(B_{lc}, \hat J_{lc})\, B_{lc}\Bigr)

    The feedback :math:`B_{lc}: [n_l]` of each output unit has :math:`\lVert B_{lc} \rVert = 1`; it is a column of the paper's
    :math:`[n_l, C]` matrix. :math:`\hat J_l` is that of :class:`FDFA`. Only the direction is learned, so rates of `B` are of the
    order of 1, and its weight decay does nothing.

    Call `learner.feedback_step(x)` after every backward pass, before the optimizers step. Signals are always sent through
    normalised feedback. The stored `B` gets norm 1 again when the next phase begins.

    The paper adds a calibration: one mini-batch by backprop every few epochs. Run that step inside `learner.exact()`
    (`--calibrate-every` on the command line). It transports weights, and helps DFA and Frozen as well, so compare with
    these rules under the same calibration.

    init: the feedback weights before they are normalised, see :class:`Dense`.

    Caillon, Fagnou, Delattre & Allauzen, "Scaling Direct Feedback Learning with Jacobian Alignment Guarantees", ICLR 2026. We
    had no code of the authors. Inferred: that columns belong to output units, that each sample has its own perturbation, that
    all layers are perturbed at once, and the initial law. The paper perturbs weights if they are fewer; we never do.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.rules.GrAPE(), example=x)
        >>> nn.functional.cross_entropy(learner(x), y).backward()
        >>> learner.feedback_step(x)  # gives B its gradient; before the optimizer steps
        >>> B = learner.feedback_of(learner.graph.edges[0])
        >>> torch.allclose(B.norm(dim=1), torch.ones(3))  # one unit vector per class
        True
    """

    init: str = "scaled_normal"

    name = "grape"
    label = "GrAPE"
    paper = "Caillon et al. 2026"
    in_phase = True
    unlocked = "backward"
    learned = True

    def __post_init__(self) -> None:
        refuse_zeros(self.label, self)

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        return star(sites, source, Normalised(self.init))

    def feedback_step(self, phase: Phase) -> None:
        for edge, moves, noise in phase.perturbed():
            with torch.no_grad(), torch.autocast(moves.device.type, enabled=False):
                weights = phase.weights(edge)
                (J,) = Dense().correlate(weights, moves / len(moves), noise, center=False)
                B = weights[0].data.div_(
                    _norms(weights[0])
                )  # .data: what is sent does not change by it
                J = J / _norms(J)
                cosine = (B * J).flatten(1).sum(1)
                phase.give(edge, ((cosine.view(-1, *[1] * (B.dim() - 1)) * B - J) / len(B),))


@dataclass(frozen=True)
class Normalised(Operator):
    """Dense feedback that sends with norm 1 from every source unit, whatever the norm of its stored weights."""

    init: str

    def create(self, source: Shape, site: Shape, generator: torch.Generator) -> Weights:
        (B,) = Dense(self.init).create(source, site, generator)
        return (B / _norms(B),)

    def send(self, weights: Weights, d: Tensor, site: Shape) -> Tensor:
        return Dense().send(weights, d.reshape(len(d), -1) / _norms(weights[0]).flatten(), site)

    def macs(self, source: Shape, site: Shape) -> int:
        return Dense().macs(source, site)

    def bytes(self, source: Shape, site: Shape) -> int:
        return Dense().bytes(source, site)


def _norms(B: Tensor) -> Tensor:
    """The norm of what comes from each source unit, to divide by: `[C, 1, ...]`."""
    norms = torch.linalg.vector_norm(B, dim=tuple(range(1, B.dim())), keepdim=True)
    return norms.clamp_min(torch.finfo(B.dtype).tiny)
