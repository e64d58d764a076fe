"""Weight mirror."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from feedbackward.activity import LayerInput, Site, Source
from feedbackward.errors import AttachError
from feedbackward.graph import Edge, Graph
from feedbackward.operators.layer import LayerShaped
from feedbackward.rule import Rule
from feedbackward.topologies import chain

if TYPE_CHECKING:
    from feedbackward.engine.phase import Phase


@dataclass(frozen=True)
class WeightMirror(Rule):
    r"""Weight mirror: feedback alignment whose feedback learns the forward weights from each layer's response to noise.

    .. math::
        \delta h_{l-1} = \delta a_l\, B_l, \qquad
        \nabla B_l = \lambda B_l - \tfrac1M\, y^\top \xi,\quad y = \xi W_l^\top,\quad \xi: [M, n_{l-1}] \sim \mathcal N(0, 1)

    Call `learner.feedback_step(x)` for a mirror phase, before the optimizer of the feedback steps. The values of the inputs do
    not matter. With a few hundred phases before training, `B` begins aligned; the authors do this.

    Each layer gets centred noise as its input, and its response is taken without bias, norm and activation. Then
    :math:`E[y^\top\xi]/M = W_l`, and `B` moves to :math:`W_l/\lambda`. For a convolution, the sum of products over all positions
    is divided by the number of positions that each weight of the kernel takes part in. Weight decay in the optimizer of `B`
    adds to :math:`\lambda`.

    samples: M, noise samples per phase. The noise in :math:`\nabla B` is about :math:`\sqrt{n_{l-1}/M}` times the weights, and
        less for convolutions, by the root of the number of positions. If it matters, lower B's rate.
    decay: :math:`\lambda`.
    init, scale: of the feedback weights, see :class:`LayerShaped`.

    Akrout, Wilson, Humphreys, Lillicrap & Tweed, "Deep Learning without Weight Transport", NeurIPS 2019 (arXiv:1904.05391). The
    authors' code has Linear layers only, sends the noise (uniform, of width 0.1) through bias and sigmoid, and adds
    :math:`0.01\, y^\top\xi` without decay, after every batch and in a first pass over the data. Its normaliser of `B` has no
    effect. Scaling by the noise's variance and by M is ours; the rate of `B` then means the same in every layer.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.rules.WeightMirror(), example=x)
        >>> nn.functional.cross_entropy(learner(x), y).backward()
        >>> learner.feedback_step(x)  # gives B its gradient; before the optimizer steps
        >>> all(B.grad is not None for B in learner.feedback.parameters())
        True
    """

    samples: int = 128
    decay: float = 1.0
    init: str = "like_weight"
    scale: float = 1.0

    name = "weight_mirror"
    label = "Weight mirror"
    paper = "Akrout et al. 2019"
    feeds = LayerInput
    in_phase = True
    learned = True

    def __post_init__(self) -> None:
        if self.samples < 1 or self.decay < 0:
            raise AttachError(
                f"{self.label} needs samples >= 1 and decay >= 0, got {self.samples} and {self.decay}."
            )

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        return chain(
            sites, lambda layer_input: LayerShaped(layer_input.form, self.init, self.scale)
        )

    def feedback_step(self, phase: Phase) -> None:
        for edge in phase.edges:
            (B,) = phase.weights(edge)
            phase.give(edge, (self.decay * B - mirrored(phase, edge, self.samples),))


@torch.no_grad()
def mirrored(phase: Phase, edge: Edge, samples: int) -> Tensor:
    """An unbiased estimate of a layer's weight from its response to centred noise, of the weight's shape.

    Its noise is about sqrt(fan-in / (samples * places)) times the weights.
    """
    layer, layer_input = edge.operator, edge.site
    assert isinstance(layer, LayerShaped)
    assert isinstance(layer_input, LayerInput)
    (B,) = phase.weights(edge)
    with torch.autocast(B.device.type, enabled=False):
        noise = phase.noise(B.new_zeros(1).expand(layer.noise_shape(samples, edge.site_shape)))
        return layer.mirrored(phase.weight(layer_input.weight).to(B.dtype), noise)
