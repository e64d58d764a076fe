"""Activation alignment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from feedbackward.rules.chain.layer_alignment import ActivityAlignment, Primitive, amp, sparse


@dataclass(frozen=True, kw_only=True)
class ActivationAlignment(ActivityAlignment):
    r"""Activation alignment: each layer's feedback weights learn to respond to its input as the forward weights do.

    .. math::
        \delta h_{l-1} = \delta a_l\, B_l, \qquad
        \mathcal R_l = \alpha\,(E\|p\|^2 + E\|q\|^2) - \beta\, E\langle p, q\rangle, \quad p = x W_l^\top,\ q = x B_l^\top

    .. math:: \nabla B_l = E\,(2\alpha\, q - \beta\, p)^\top x

    This is the delta rule with the target :math:`\beta p / 2\alpha`. `B` comes near `W` fastest in the directions in which the
    inputs vary most. These directions move with the features, so momentum :math:`\mu` makes it unstable early: keep the rate
    of `B` well below :math:`1 - \mu`, and the rate of `W` so small that `B` can follow. The rule is not local, because `q`
    sends activity through the feedback weights against their direction.

    sparse, amp: :math:`\alpha` and :math:`\beta`.
    standardize: use centred inputs of unit variance, and divide :math:`\nabla B_l` by the number of inputs of an output unit,
        so that one rate is stable in every layer. Without it, the stable rate is below :math:`1/\alpha` over the largest
        eigenvalue of :math:`E\,x^\top x`, which may be in the thousands.
    init, scale: of the feedback weights, see :class:`LayerShaped`.

    Kunin, Nayebi, Sagastuy-Brena, Ganguli, Bloom & Yamins, "Two Routes to Scalable Credit Assignment without Weight Symmetry", ICML
    2020 (arXiv:2003.01513). The authors' code has :math:`\alpha` = 1e-3 and :math:`\beta` = 2e-3 in a loss that shares the
    weights' rate. It sums over the positions of a convolution, and can centre and normalise the inputs of each sample. The
    standardisation and the defaults, 500 times as large, are ours.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.rules.ActivationAlignment(), example=x)
        >>> nn.functional.cross_entropy(learner(x), y).backward()
        >>> [tuple(B.grad.shape) for B in learner.feedback.parameters()]
        [(3, 8)]
    """

    sparse: float = 0.5
    amp: float = 1.0

    name = "activation_alignment"
    label = "Activation alignment"
    paper = "Kunin et al. 2020"
    transport = "non-local"
    learned = True

    @property
    def terms(self) -> Sequence[tuple[float, Primitive]]:
        return (self.sparse, sparse), (self.amp, amp)
