"""Batchwise random-magnitude sign-concordant feedback."""

from __future__ import annotations

from dataclasses import dataclass

from feedbackward.operators.layer import LayerShaped
from feedbackward.operators.signed import FreshSigned
from feedbackward.rules.chain.concordant import SignConcordant


@dataclass(frozen=True)
class BRSF(SignConcordant):
    r"""Batchwise random-magnitude sign-concordant feedback: new random magnitudes for every batch, with the forward signs.

    .. math:: \delta h_{l-1} = \delta a_l\, B_l, \qquad B_l = |M_t| \odot \mathrm{sign}(W_l),\quad M_t\ \text{drawn anew in pass}\ t

    The magnitudes are a hash of the layer's key, the number t of the pass and the position of the weight. They are the same
    on every rank and device, go on after loading a `state_dict`, and do not depend on the generators that dropout draws
    from. 16 bytes are stored for each layer. Every forward pass under cuts counts, each accumulated one too; probes do not.

    init, scale: the law of :math:`M_t`, see :class:`LayerShaped`.
    follow_norm: give B the norm that W has now. :class:`USF` says more, also about strict normalisation.

    Moskovitz, Litwin-Kumar & Abbott, "Feedback alignment in deep convolutional networks", 2019 (arXiv:1812.06488), after Liao,
    Leibo & Poggio, AAAI 2016, who draw from U(0, 1) and normalise. BioTorch draws from the global generator.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.rules.BRSF(), example=x)
        >>> nn.functional.cross_entropy(learner(x), y).backward()
        >>> edge = learner.graph.edges[0]
        >>> edge.forward_weight  # whose signs the feedback uses
        '2.weight'
    """

    name = "brsf"
    label = "brSF"

    def signed(self, layer: LayerShaped) -> FreshSigned:
        return FreshSigned(layer, self.follow_norm)
