"""Sign-symmetry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from feedbackward.errors import AttachError
from feedbackward.graph import Graph, LayerInput, Site, Source
from feedbackward.operators.layer import LayerShaped
from feedbackward.operators.signed import FixedSigned, UniformSigned
from feedbackward.rule import Properties, Rule, refuse_zeros
from feedbackward.topologies import chain

_MAGNITUDES = {"uniform": UniformSigned, "random": FixedSigned}


@dataclass(frozen=True)
class SignSymmetry(Rule):
    r"""Sign-symmetry: feedback weights share the sign of the forward weights, and not their magnitude.

    .. math::
        \delta h_{l-1} = \delta a_l\, B_l, \qquad B_l = s_l\,\mathrm{sign}(W_l)\ \text{in every pass}, \qquad
        s_l = \sqrt{2 / (k^2 c_{out})}

    :math:`s_l` is the standard deviation of He's initialisation by the outgoing side; for a Linear layer
    :math:`\sqrt{2/n_{out}}` (inferred). One bit per weight is transported.

    magnitude: `"uniform"`; `"random"`: fixed magnitudes with standard deviation :math:`s_l` before they lose their sign.
    scale: a factor on :math:`s_l`.

    Liao, Leibo & Poggio, "How important is weight symmetry in backpropagation?", AAAI 2016 (arXiv:1510.05067); Xiao, Chen, Liao &
    Poggio, "Biologically-plausible learning algorithms can scale to large datasets", ICLR 2019 (arXiv:1811.03567), whose code has
    these :math:`s_l`, draws the random magnitudes from a normal law (here uniform), and trains by default the last layer's input
    signal by its true weight: name the other layers as `sites` for that. Liao et al. find batch norm and sign-only updates
    ("Batch Manhattan", an optimizer's matter) important. The control with the signs that `W` had at the start is FA.
    """

    magnitude: str = "uniform"
    scale: float = 1.0

    name = "sign_symmetry"
    label = "Sign-symmetry"
    paper = "Liao et al. 2016; Xiao et al. 2019"
    feeds = LayerInput
    properties = Properties(
        backward_unlocked=False,
        update_unlocked=False,
        forward_unlocked=False,
        weight_transport="signs",
        learned_feedback=False,
        backward_steps="L - 1",
        extra_memory="0",
        extra_compute="0",
    )

    def __post_init__(self) -> None:
        refuse_zeros(self.label, self)
        if self.magnitude not in _MAGNITUDES:
            raise AttachError(
                f"unknown magnitude {self.magnitude!r} of {self.label}: choose one of {', '.join(_MAGNITUDES)}."
            )

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        signed = _MAGNITUDES[self.magnitude]
        return chain(
            sites,
            lambda layer_input: signed(
                LayerShaped(layer_input.form, "kaiming_fan_out", self.scale)
            ),
            with_forward_weight=True,
        )
