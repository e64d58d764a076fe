"""Activation alignment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .base import Properties
from .layer_alignment import LayerAlignment, Primitive, amp, sparse


@dataclass(frozen=True, kw_only=True)
class ActivationAlignment(LayerAlignment):
    r"""Activation alignment: each layer's feedback weights learn to answer its input as its forward weights do.

    .. math::
        \delta h_{l-1} = \delta a_l\, B_l, \qquad
        \mathcal R_l = \alpha\,(E\|p\|^2 + E\|q\|^2) - \beta\, E\langle p, q\rangle, \quad p = x W_l^\top,\ q = x B_l^\top

    .. math:: \nabla B_l = E\,(2\alpha\, q - \beta\, p)^\top x

    The delta rule with the target :math:`\beta p / 2\alpha`: `B` nears `W` fastest where the inputs vary most. It is stable while
    `B`'s rate is below :math:`1/\alpha` over the largest eigenvalue of :math:`E\,x^\top x`, which for wide layers after a ReLU is
    far above 1. It is not local: `q` sends activity along the feedback weights against their direction.

    sparse, amp: :math:`\alpha` and :math:`\beta`.
    init, scale: of the feedback weights, see :class:`feedbackward.LayerShaped`.

    Kunin, Nayebi, Sagastuy-Brena, Ganguli, Bloom & Yamins, "Two Routes to Scalable Credit Assignment without Weight Symmetry", ICML
    2020 (arXiv:2003.01513). The authors' code has :math:`\alpha` = 1e-3 and :math:`\beta` = 2e-3 in a loss
    that shares the weights' rate; the defaults here are 500 times as large, for a rate of `B`'s own. There, sums run over the
    positions of a convolution, and activities may be centred or normalised, which is left out here.
    """

    sparse: float = 0.5
    amp: float = 1.0

    name = "activation_alignment"
    label = "Activation alignment"
    paper = "Kunin et al. 2020"
    properties = Properties(
        backward_unlocked=False,
        update_unlocked=False,
        forward_unlocked=False,
        weight_transport="non-local",
        learned_feedback=True,
        backward_steps="L",
        extra_memory="W + opt.",
        extra_compute="4 forward passes",
    )

    @property
    def terms(self) -> Sequence[tuple[float, Primitive]]:
        return (self.sparse, sparse), (self.amp, amp)
