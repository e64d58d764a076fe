"""Self-alignment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from feedbackward.rules.chain.layer_alignment import LayerAlignment, Primitive, self_product


@dataclass(frozen=True, kw_only=True)
class SelfAlignment(LayerAlignment):
    r"""Self-alignment: every step adds the forward weights to the feedback weights (the primitive "self" alone).

    .. math::
        \delta h_{l-1} = \delta a_l\, B_l, \qquad
        \mathcal R_l = -\beta \sum W_l \odot B_l, \qquad \nabla B_l = -\beta\, W_l

    `B` is its initial value plus :math:`\eta\beta` times the sum of all `W` so far. Its direction comes near theirs, and its norm
    grows without bound unless the optimizer of `B` decays it. With a decay :math:`\lambda` it moves to
    :math:`\beta W_l/\lambda`, and :math:`\lambda = \beta` is symmetric alignment. The rule is not local.

    self_product: :math:`\beta`. It is small, so that a run ends before `B` is much larger than `W`.
    init, scale: of the feedback weights, see :class:`LayerShaped`.

    Kunin, Nayebi, Sagastuy-Brena, Ganguli, Bloom & Yamins, "Two Routes to Scalable Credit Assignment without Weight Symmetry", ICML
    2020 (arXiv:2003.01513), who use the primitive only together with a decay (symmetric alignment). As a rule by itself it is a
    control (inferred).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.rules.SelfAlignment(self_product=0.5), example=x)
        >>> nn.functional.cross_entropy(learner(x), y).backward()
        >>> B = learner.feedback_of(learner.graph.edges[0])
        >>> torch.equal(B.grad, -0.5 * model[2].weight)
        True
    """

    self_product: float = 0.01

    name = "self_alignment"
    label = "Self-alignment"
    paper = "Kunin et al. 2020"
    transport = "non-local"
    learned = True

    @property
    def terms(self) -> Sequence[tuple[float, Primitive]]:
        return ((self.self_product, self_product),)
