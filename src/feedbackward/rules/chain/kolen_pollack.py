"""Kolen-Pollack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from feedbackward.activity import LayerInput, Site, Source
from feedbackward.graph import Graph
from feedbackward.operators.layer import LayerShaped
from feedbackward.rule import Rule
from feedbackward.topologies import chain


@dataclass(frozen=True)
class KolenPollack(Rule):
    r"""Kolen-Pollack: feedback alignment whose feedback weights get the forward weights' own gradient.

    .. math::
        \delta h_{l-1} = \delta a_l\, B_l, \qquad \nabla B_l = \nabla W_l = \delta a_l^\top h_{l-1}

    With the same optimizer, rate and weight decay for both, :math:`W_l - B_l` shrinks as :math:`(1 - \eta\lambda)^t` under
    plain SGD, whatever the data are. The product :math:`\delta a_l^\top h_{l-1}` is computed once, for both.

    init, scale: of the feedback weights, see :class:`LayerShaped`. `"mirrored"` lets them begin near the forward weights, as
        far as noise at each layer's input shows these. :meth:`published` begins at random, from which alignment takes many
        steps or strong decay: attach to a model that has the weights it will be trained from.

    Kolen & Pollack, "Backpropagation without weight transport", ICNN 1994; Akrout, Wilson, Humphreys, Lillicrap & Tweed,
    "Deep Learning without Weight Transport", NeurIPS 2019 (arXiv:1904.05391). The authors' code has no weight decay by
    default. The difference then stays, and alignment grows only with the weights.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import torch.nn.functional as F
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.KolenPollack(), example=x)
        >>> F.cross_entropy(learner(x), y).backward()
        >>> B = learner.feedback_of(learner.graph.edges[0])
        >>> torch.equal(B.grad, model[2].weight.grad)
        True
    """

    init: str = "mirrored"
    scale: float = 1.0

    name = "kp"
    label = "KP"
    paper = "Kolen & Pollack 1994; Akrout et al. 2019"
    feeds = LayerInput
    learned = True
    one_rate = True

    @classmethod
    def published(cls, **changes: Any) -> KolenPollack:
        """The authors' form, in which `B` begins at random."""
        return replace(cls(init="xavier_uniform"), **changes)

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        return chain(
            sites,
            lambda layer_input: LayerShaped(layer_input.form, self.init, self.scale),
            shared=True,
        )
