"""Fixed random-magnitude sign-concordant feedback."""

from __future__ import annotations

from dataclasses import dataclass

from feedbackward.operators.layer import LayerShaped
from feedbackward.operators.signed import FixedSigned
from feedbackward.rules.chain.concordant import SignConcordant


@dataclass(frozen=True)
class FRSF(SignConcordant):
    r"""Fixed random-magnitude sign-concordant feedback: fixed magnitudes, with the present signs of the forward weights.

    .. math:: \delta h_{l-1} = \delta a_l\, B_l, \qquad B_l = |M_l| \odot \mathrm{sign}(W_l),\quad M_l\ \text{drawn once}

    One bit per weight is transported.

    init, scale: the law of :math:`M_l`, see :class:`LayerShaped`.
    follow_norm: give B the norm that W has now. :class:`USF` says more, also about strict normalisation.

    Moskovitz, Litwin-Kumar & Abbott, "Feedback alignment in deep convolutional networks", 2019 (arXiv:1812.06488), after Liao,
    Leibo & Poggio, AAAI 2016. The gradients equal those of BioTorch: the magnitudes follow the layer's initial law. Liao et
    al. draw them from U(0, 1) and normalise. The alignment that BioTorch reports for this rule compares `W` with
    :math:`|M|` without the signs, and is meaningless.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.rules.FRSF(), example=x)
        >>> nn.functional.cross_entropy(learner(x), y).backward()
        >>> edge = learner.graph.edges[0]
        >>> edge.forward_weight  # whose signs the feedback uses
        '2.weight'
    """

    name = "frsf"
    label = "frSF"

    def signed(self, layer: LayerShaped) -> FixedSigned:
        return FixedSigned(layer, self.follow_norm)
