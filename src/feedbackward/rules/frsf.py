"""Fixed random-magnitude sign-concordant feedback."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..graph import Arc, Graph, Site, Source, chain
from ..operators.layer import LayerShaped
from ..operators.signed import FixedSigned
from .base import Properties, Rule, refuse_zeros


@dataclass(frozen=True)
class FRSF(Rule):
    r"""Fixed random-magnitude sign-concordant feedback: fixed magnitudes, with the signs that the forward weights have now.

    .. math:: \delta h_{l-1} = \delta a_l\, B_l, \qquad B_l = |M_l| \odot \mathrm{sign}(W_l),\quad M_l\ \text{drawn once}

    One bit per weight is transported.

    init, scale: the law of :math:`M_l`, see :class:`feedbackward.LayerShaped`.
    follow_norm: give B the norm that W has now. See uSF, also for strict normalisation.

    Moskovitz, Litwin-Kumar & Abbott, "Feedback alignment in deep convolutional networks", 2019 (arXiv:1812.06488), after Liao,
    Leibo & Poggio, AAAI 2016. As in BioTorch, whose gradients these equal, the magnitudes are those of the layer's initial law;
    Liao et al. draw them from U(0, 1) and normalise. BioTorch's alignment of this rule compares `W` with :math:`|M|` without the
    signs, and means nothing.
    """

    init: str = "xavier_uniform"
    scale: float = 1.0
    follow_norm: bool = False

    name = "frsf"
    label = "frSF"
    paper = "Moskovitz et al. 2019"
    feeds = Arc
    properties = Properties(
        backward_unlocked=False,
        update_unlocked=False,
        forward_unlocked=False,
        weight_transport="signs",
        learned_feedback=False,
        backward_steps="L - 1",
        extra_memory="W",
        extra_compute="0",
    )

    def __post_init__(self) -> None:
        refuse_zeros(self.label, self)

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        def signed(arc: Arc) -> FixedSigned:
            return FixedSigned(LayerShaped(arc.form, self.init, self.scale), self.follow_norm)

        return chain(sites, signed, borrowed=True)
