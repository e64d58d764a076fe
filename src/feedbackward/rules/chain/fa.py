"""Feedback alignment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from feedbackward.activity import LayerInput, Site, Source
from feedbackward.graph import Graph
from feedbackward.operators.layer import LayerShaped
from feedbackward.rule import Rule, refuse_zeros
from feedbackward.topologies import chain


@dataclass(frozen=True)
class FA(Rule):
    r"""Feedback alignment: backprop's chain with fixed random weights in place of the transposed forward ones.

    .. math:: \delta h_{l-1} = \delta a_l\, B_l, \qquad B_l\ \text{fixed, of the shape of}\ W_l

    For a convolution, :math:`\delta h_{l-1}` is the transposed convolution of :math:`\delta a_l: [N, c_l, H, W]` with
    :math:`B_l: [c_l, c_{l-1}, k, k]`, same stride, padding, dilation and groups. Norms, activations, pooling and skip
    paths are differentiated exactly; so with `B = W` it is backprop.

    init, scale: of the feedback weights, see :class:`LayerShaped`. With `"like_weight"` they are as large as the layer's own
        weights are at `attach`, so that the signals neither vanish nor explode with depth. With `"mirrored"` they begin near the
        weights, as far as noise at each layer's input shows these, and stay (one-time soft alignment, arXiv:2505.20892).

    Lillicrap, Cownden, Tweed & Akerman, "Random synaptic feedback weights support error backpropagation for deep
    learning", Nature Communications 7:13276, 2016 (arXiv:1411.0247). BioTorch draws `B` and `W` by one law, `"xavier_uniform"`;
    with a `W` of another law that `B` would be too large or too small.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.FA(), example=x)
        >>> nn.functional.cross_entropy(learner(x), y).backward()
        >>> [tuple(B.shape) for B in learner.feedback.buffers()]  # as model[2].weight
        [(3, 8)]
    """

    init: str = "like_weight"
    scale: float = 1.0

    name = "fa"
    label = "FA"
    paper = "Lillicrap et al. 2016"
    feeds = LayerInput

    def __post_init__(self) -> None:
        refuse_zeros(self.label, self)

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        return chain(
            sites, lambda layer_input: LayerShaped(layer_input.form, self.init, self.scale)
        )
