"""Information alignment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from feedbackward.rules.chain.layer_alignment import ActivityAlignment, Primitive, amp, decay, null


@dataclass(frozen=True, kw_only=True)
class InformationAlignment(ActivityAlignment):
    r"""Information alignment: each layer's feedback weights learn to reconstruct the layer's input from its output.

    .. math::
        \delta h_{l-1} = \delta a_l\, B_l, \qquad
        \mathcal R_l = -\alpha\, E\langle p, x B_l^\top\rangle + \beta\, E\|p B_l\|^2 + \gamma\,(\|W_l\|^2 + \|B_l\|^2), \quad
        p = x W_l^\top

    .. math:: \nabla B_l = E\, p^\top(2\beta\, p B_l - \alpha\, x) + 2\gamma B_l

    The rule is local: it uses the output, the input, and what the feedback weights make of the output. The first term is the
    Hebbian term of the weight mirror, applied to the activities. The second keeps `B` from growing. For white inputs `B`
    moves to :math:`\tfrac\alpha2 (\gamma + \beta\, W W^\top)^{-1} W`, in which the strong directions of `W` are weaker than in
    `W` itself.

    amp, null, decay: :math:`\alpha`, :math:`\beta` and :math:`\gamma`.
    standardize: use centred inputs of unit variance, and divide :math:`\nabla B_l` by the number of inputs of an output unit,
        so that one rate is stable in every layer.
    init, scale: of the feedback weights, see :class:`LayerShaped`.

    Kunin, Nayebi, Sagastuy-Brena, Ganguli, Bloom & Yamins, "Two Routes to Scalable Credit Assignment without Weight Symmetry", ICML
    2020 (arXiv:2003.01513). The authors' code has 2e-3, 1e-3 and 1e-3 in a loss that shares the weights' rate.
    It sums over the positions of a convolution, and can centre and normalise the inputs of each sample. The standardisation
    and the defaults, 500 times as large, are ours.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.rules.InformationAlignment(), example=x)
        >>> nn.functional.cross_entropy(learner(x), y).backward()
        >>> [tuple(B.grad.shape) for B in learner.feedback.parameters()]
        [(3, 8)]
    """

    amp: float = 1.0
    null: float = 0.5
    decay: float = 0.5

    name = "information_alignment"
    label = "Information alignment"
    paper = "Kunin et al. 2020"
    learned = True

    @property
    def terms(self) -> Sequence[tuple[float, Primitive]]:
        return (self.amp, amp), (self.null, null), (self.decay, decay)
