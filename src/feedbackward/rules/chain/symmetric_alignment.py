"""Symmetric alignment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from feedbackward.rules.chain.layer_alignment import LayerAlignment, Primitive, decay, self_product


@dataclass(frozen=True, kw_only=True)
class SymmetricAlignment(LayerAlignment):
    r"""Symmetric alignment: the feedback weights of each layer move towards the forward weights.

    .. math::
        \delta h_{l-1} = \delta a_l\, B_l, \qquad
        \mathcal R_l = \alpha\,(\|W_l\|^2 + \|B_l\|^2) - \beta \sum W_l \odot B_l, \qquad \nabla B_l = 2\alpha B_l - \beta W_l

    `B` moves to :math:`\beta W_l / 2\alpha`; with the defaults each step is :math:`-\eta\,(B_l - W_l)`. Weight transport then takes
    time instead of being instantaneous, but the rule is not local.

    decay, self_product: :math:`\alpha` and :math:`\beta`.
    init, scale: of the feedback weights, see :class:`LayerShaped`.

    Kunin, Nayebi, Sagastuy-Brena, Ganguli, Bloom & Yamins, "Two Routes to Scalable Credit Assignment without Weight Symmetry", ICML
    2020 (arXiv:2003.01513). The authors' code has :math:`\alpha` = 1e-3 and :math:`\beta` = 2e-3 in a loss
    that shares the weights' rate. Here only their products with `B`'s rate matter, and the defaults are 500 times as large. Only
    `B` descends the regulariser, which is also the default there.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.rules.SymmetricAlignment(), example=x)
        >>> nn.functional.cross_entropy(learner(x), y).backward()
        >>> B = learner.feedback_of(learner.graph.edges[0])
        >>> torch.allclose(B.grad, B - model[2].weight)
        True
    """

    decay: float = 0.5
    self_product: float = 1.0

    name = "symmetric_alignment"
    label = "Symmetric alignment"
    paper = "Kunin et al. 2020"
    transport = "non-local"
    learned = True

    @property
    def terms(self) -> Sequence[tuple[float, Primitive]]:
        return (self.decay, decay), (self.self_product, self_product)
