"""Uniform sign-concordant feedback."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..graph import Arc, Graph, Site, Source, chain
from ..operators.layer import LayerShaped
from ..operators.signed import UniformSigned
from .base import Properties, Rule, refuse_zeros


@dataclass(frozen=True)
class USF(Rule):
    r"""Uniform sign-concordant feedback: a chain that uses the signs of the forward weights, and one magnitude per layer.

    .. math:: \delta h_{l-1} = \delta a_l\, B_l, \qquad B_l = \sigma_l\,\mathrm{sign}(W_l)\ \text{in every pass}

    One bit per weight is transported; nothing is stored. :math:`\sigma_l` is the standard deviation of the initial law. A weight
    that is exactly zero feeds nothing back: a layer that starts at zero has no feedback until it has moved.

    init, scale: the law, see :class:`feedbackward.LayerShaped`. `"xavier_uniform"` gives
        :math:`\sigma_l = \sqrt{2/(\mathrm{fan_{in}} + \mathrm{fan_{out}})}`, `"like_layer"` :math:`1/\sqrt{3\,\mathrm{fan_{in}}}`.

    Moskovitz, Litwin-Kumar & Abbott, "Feedback alignment in deep convolutional networks", 2019 (arXiv:1812.06488); the name and
    the rule are older: Liao, Leibo & Poggio, "How important is weight symmetry in backpropagation?", AAAI 2016. The magnitude is
    that of BioTorch, whose gradients these equal (its benchmarks name this rule); Liao et al. leave it out and normalise. The
    paper's strict normalisation keeps each weight's norm, see :func:`feedbackward.keep_norms`.
    """

    init: str = "xavier_uniform"
    scale: float = 1.0

    name = "usf"
    label = "uSF"
    paper = "Moskovitz et al. 2019"
    feeds = Arc
    properties = Properties(
        backward_unlocked=False,
        update_unlocked=False,
        forward_unlocked=False,
        weight_transport="signs",
        learned_feedback=False,
        backward_steps="L",
        extra_memory="0",
        extra_compute="0",
    )

    def __post_init__(self) -> None:
        refuse_zeros(self.label, self)

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        return chain(
            sites, lambda arc: UniformSigned(LayerShaped(arc.form, self.init, self.scale)), borrowed=True
        )
