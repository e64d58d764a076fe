"""Direct Kolen-Pollack predictive coding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from feedbackward.activity import Site
from feedbackward.errors import AttachError
from feedbackward.rules.direct.dkp import DKP
from feedbackward.rules.targets.decoding import learning, rows

if TYPE_CHECKING:
    from feedbackward.engine.phase import Phase


@dataclass(frozen=True)
class DKPPC(DKP):
    r"""Direct Kolen-Pollack predictive coding: DKP updates the weights, and predictive coding updates them a second time.

    .. math::
        &\text{1. DKP:} && W' = W - \eta_1\, \nabla_1, \quad \nabla_1\ \text{and}\ \nabla B_l\ \text{as in DKP} \\
        &\text{2. beliefs:} && z_l \leftarrow h_l - \gamma N\, \partial E / \partial z_l, \quad
            E = \mathrm{loss}(f_L(z_{L-1})) + \tfrac{1}{2N} \textstyle\sum_l \| z_l - f_l(z_{l-1}) \|^2\ \text{under}\ W' \\
        &\text{3. both:} && \nabla W = \nabla_1 + \rho\, \partial E / \partial W'

    `h_l` and `e` are those of W, :math:`f_l` is the segment below site l, and N counts samples (times output tokens). On linear
    layers, with :math:`\epsilon_l = z_l - z_{l-1} W_l'^\top`, step 2 is :math:`z_l \leftarrow z_l + \gamma (\epsilon_{l+1} W'_{l+1} -
    \epsilon_l)`: one layer down, through transposed weights. Step 3 then descends :math:`-\rho\, \epsilon_l^\top z_{l-1} / N`.

    Call `learner.feedback_step(x, loss_fn)` once after the backward pass of a batch (gradients of several batches cannot be
    accumulated), before the optimizers step. W' is never stored: with plain SGD at the rate :math:`\eta_1` for W the one step on
    :math:`\nabla W` is the paper's two, the second at the rate :math:`\rho\,\eta_1`. With any other optimizer or rate, beliefs
    meet a W' at which the weights do not arrive (inferred).

    rate: :math:`\eta_1`, the rate of the first update.
    gamma, steps: the size and the number of the inference steps.
    ratio: :math:`\rho`, the rate of the second update relative to the first.
    center and the other options: of the first update, as in :class:`DKP`, which has :meth:`published` too.

    Casnici, Lefebvre, Dauwels & Frenkel, "Direct Kolen-Pollack predictive coding", 2026 (arXiv:2602.15571), known to us through
    another implementation, whose beliefs are pre-activations and whose first update has no f': name the layers as `sites` for
    that. Its :math:`\rho` and gamma are the defaults. Below the last site the second update mostly takes back some of the
    first, the more the larger :math:`\eta_1` and the more positions a kernel has: with a large :math:`\rho` it overshoots.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.rules.DKPPC(rate=0.1), example=x)
        >>> optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)  # the rule's own rate
        >>> loss = lambda output: nn.functional.cross_entropy(output, y)
        >>> loss(learner(x)).backward()
        >>> learner.feedback_step(x, loss)
        >>> optimizer.step()
    """

    rate: float = 0.02
    gamma: float = 0.1
    steps: int = 1
    ratio: float = 0.01

    name = "dkp_pc"
    label = "DKP-PC"
    paper = "Casnici et al. 2026"
    in_phase = True
    revises = True
    linear = False
    transport = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.rate > 0 and self.gamma > 0 and self.ratio > 0 and self.steps >= 1):
            raise AttachError(
                f"{self.label} needs rate, gamma, ratio above 0 and one step, got {self}."
            )

    def feedback_step(self, phase: Phase) -> None:
        with learning(phase):
            beliefs, error = _first(phase)
            for edge in phase.edges:
                sides = rows(edge, error), rows(edge, beliefs[edge.site].detach())
                phase.give(edge, self.feedback_grad(edge, phase.weights(edge), *sides))
            moved = phase.moved(self.rate)
            n = error.shape[: 1 + phase.edges[0].source.tokens].numel()
            for _ in range(self.steps):
                slopes = torch.autograd.grad(
                    _energy(phase, beliefs, moved, n), list(beliefs.values())
                )
                steps = zip(beliefs.items(), slopes, strict=True)
                beliefs = {site: _leaf(z - self.gamma * n * slope) for (site, z), slope in steps}
            energy = self.ratio * _energy(phase, beliefs, moved, n)
            second = torch.autograd.grad(energy, list(moved.values()), allow_unused=True)
            phase.revise(
                {k: grad for k, grad in zip(moved, second, strict=True) if grad is not None}
            )


def _first(phase: Phase) -> tuple[dict[Site, Tensor], Tensor]:
    """The activities, as beliefs to begin with, and the error at the source, under the weights as they are."""
    beliefs: dict[Site, Tensor] = {}

    def keep(site: Site, h: Tensor) -> Tensor:
        return beliefs.setdefault(site, _leaf(h))

    made = phase.forward(keep, gradients=True)
    return beliefs, torch.autograd.grad(phase.loss(made.output), list(made.sources.values()))[0]


def _energy(
    phase: Phase, beliefs: dict[Site, Tensor], weights: dict[str, Tensor], n: int
) -> Tensor:
    """E: every segment starts from the belief below it and is compared with the one above."""
    made = phase.forward(lambda site, h: beliefs[site], gradients=True, weights=weights)
    gaps = [(z - made.sites[site]).square().sum() for site, z in beliefs.items()]
    return phase.loss(made.output) + torch.stack(gaps).sum() / (2 * n)


def _leaf(t: Tensor) -> Tensor:
    return t.detach().requires_grad_()
