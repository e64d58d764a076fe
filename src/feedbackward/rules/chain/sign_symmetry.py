"""Sign-symmetry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from feedbackward.activity import LayerInput, Site, Source
from feedbackward.errors import AttachError
from feedbackward.graph import Graph
from feedbackward.operators.layer import LayerShaped
from feedbackward.operators.signed import FixedSigned, Signed, UniformSigned
from feedbackward.rule import Rule, refuse_zeros
from feedbackward.topologies import chain

_MAGNITUDES: dict[str, type[Signed]] = {"uniform": UniformSigned, "random": FixedSigned}


@dataclass(frozen=True)
class SignSymmetry(Rule):
    r"""Sign-symmetry: feedback weights share the sign of the forward weights, and not their magnitude.

    .. math::
        \delta h_{l-1} = \delta a_l\, B_l, \qquad
        B_l = s_l\,\mathrm{sign}(W_l)\ \text{in every pass}

        s_l = \sqrt{2 / (k^2 c_{out})}\ \text{for a convolution}, \qquad
        s_l = 1 / \sqrt{n_{in}}\ \text{for a Linear layer}

    :math:`k^2` counts the positions of the kernel. One bit per weight is transported.

    magnitude: `"uniform"`: :math:`s_l` for every weight. `"random"`: magnitudes that are drawn once
        and stay, :math:`|U(-b, b)|` with :math:`b = \sqrt{3}\, s_l` for a convolution and
        :math:`b = s_l` for a Linear layer.
    scale: a factor on :math:`s_l`.

    Liao, Leibo & Poggio, "How important is weight symmetry in backpropagation?", AAAI 2016
    (arXiv:1510.05067); Xiao, Chen, Liao & Poggio, "Biologically-plausible learning algorithms can
    scale to large datasets", ICLR 2019 (arXiv:1811.03567). The magnitudes are those of the code of
    Xiao et al., except that it draws the random ones of a convolution from a normal law with the
    same standard deviation. By default that code trains the last layer's input signal by its true
    weight: name the other layers as `sites` for that. Liao et al. find batch norm and sign-only
    updates ("Batch Manhattan", an optimizer's matter) important. The control with the signs that
    `W` had at the start is FA.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.rules.SignSymmetry(), example=x)
        >>> nn.functional.cross_entropy(learner(x), y).backward()
        >>> learner.feedback_bytes  # the signs are those of the forward weights
        0
    """

    magnitude: str = "uniform"
    scale: float = 1.0

    name = "sign_symmetry"
    label = "Sign-symmetry"
    paper = "Liao et al. 2016; Xiao et al. 2019"
    feeds = LayerInput
    transport = "signs"

    def __post_init__(self) -> None:
        refuse_zeros(self.label, self)
        if self.magnitude not in _MAGNITUDES:
            raise AttachError(
                f"unknown magnitude {self.magnitude!r} of {self.label}: choose one of {', '.join(_MAGNITUDES)}."
            )

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        return chain(sites, self._operator, with_forward_weight=True)

    def _operator(self, layer_input: LayerInput) -> Signed:
        """Scaled as torchvision scales a ResNet's convolution and `nn.Linear` its own weight."""
        signed, form = _MAGNITUDES[self.magnitude], layer_input.form
        if form.stride:
            return signed(LayerShaped(form, "kaiming_fan_out", self.scale))
        # a uniform magnitude is the law's standard deviation, b / sqrt(3): it must come to s
        widened = math.sqrt(3) if self.magnitude == "uniform" else 1.0
        return signed(LayerShaped(form, "like_layer", widened * self.scale))
