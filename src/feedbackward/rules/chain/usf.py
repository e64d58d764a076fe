"""Uniform sign-concordant feedback."""

from __future__ import annotations

from dataclasses import dataclass

from feedbackward.operators.layer import LayerShaped
from feedbackward.operators.signed import UniformSigned
from feedbackward.rules.chain.concordant import SignConcordant


@dataclass(frozen=True)
class USF(SignConcordant):
    r"""Uniform sign-concordant feedback: the signs of the forward weights, with one magnitude per layer.

    .. math:: \delta h_{l-1} = \delta a_l\, B_l, \qquad B_l = \sigma_l\,\mathrm{sign}(W_l)\ \text{in every pass}

    One bit per weight is transported, and nothing is stored. :math:`\sigma_l` is the standard deviation of the initial law. A
    weight that is exactly zero sends nothing back, so a layer that starts at zero has no feedback before its first update.

    init, scale: the law, see :class:`LayerShaped`. `"xavier_uniform"` gives
        :math:`\sigma_l = \sqrt{2/(\mathrm{fan_{in}} + \mathrm{fan_{out}})}`, `"like_layer"` :math:`1/\sqrt{3\,\mathrm{fan_{in}}}`.
    follow_norm: give B the norm that W has now, instead of that of its initial law.

    Moskovitz, Litwin-Kumar & Abbott, "Feedback alignment in deep convolutional networks", 2019 (arXiv:1812.06488); the name and
    the rule are older: Liao, Leibo & Poggio, "How important is weight symmetry in backpropagation?", AAAI 2016. The magnitude is
    that of BioTorch, whose gradients these equal. Liao et al. have no magnitude and normalise. The strict normalisation
    :math:`W \leftarrow W \|W_0\|/\|W\|` is :func:`renormalize_weights`. We know it from BioTorch, whose weights do not train
    with it. `follow_norm` keeps the same ratio by changing B instead of W (inferred).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.rules.USF(), example=x)
        >>> nn.functional.cross_entropy(learner(x), y).backward()
        >>> learner.feedback_bytes  # the signs are those of the forward weights
        0
    """

    name = "usf"
    label = "uSF"

    def signed(self, layer: LayerShaped) -> UniformSigned:
        return UniformSigned(layer, self.follow_norm)
