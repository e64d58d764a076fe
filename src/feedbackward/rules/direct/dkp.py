"""Direct Kolen-Pollack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from feedbackward.activity import Site, Source
from feedbackward.errors import AttachError
from feedbackward.graph import Edge, Graph
from feedbackward.operators import Auto, Dense, Operator, Orthogonal, Weights
from feedbackward.rules.direct.augmented import Augmented, activity
from feedbackward.rules.direct.whitening import has_places, whitened
from feedbackward.topologies import star


@dataclass(frozen=True)
class DKP(Augmented):
    r"""Direct Kolen-Pollack: DFA whose feedback is learned from the error and the site's own activity.

    .. math::
        \delta h_l = \mathrm{strength} \cdot e\, (B_l B_l^\top)^{-1/2} B_l, \qquad
        \nabla B_l = e^\top h_l\, C_l^{-1} \quad [C, n_l], \qquad
        B_l \leftarrow B_l - \eta\,(\nabla B_l + \lambda B_l)

    with the covariance :math:`C_l` of the channels of a map, or of the features of tokens, over samples and places
    (:math:`C_l = I` for a site without places). `e = dLoss/da_L: [N, C]` carries the 1/N of a mean loss, so the gradient is
    a batch mean; the signal uses `B` before its update. What a site is sent depends on the directions in `B` alone
    (:class:`Orthogonal`), so that one rate and one optimizer suit the forward weights and `B`.

    :meth:`published` is the authors' form, :math:`\delta h_l = e\, B_l` and :math:`\nabla B_l = e^\top h_l`. There the
    gradient at the last hidden layer is that of `W_L`, so under equal plain SGD `W_L - B_{L-1}` shrinks as
    :math:`(1 - \eta\lambda)^t` (Kolen & Pollack 1994); below it, `B_l` is a linear readout of `h_l` that shares the
    network's error. With one rate for `W` and `B` it was no better than DFA where we measured it
    (bench/results/dkp_default.md).

    center: subtract the batch mean of each feature from :math:`h_l`. Then `B` does not follow the mean of the errors, which is
        that of the batch's classes where all are equally frequent. Elsewhere it is a signal (targets with a mean of their own, rare
        classes), and centred feedback did harm (bench/results/dkp_center.md). Needs a batch of at least 2.
    whiten: multiply by :math:`C_l^{-1}`. The channels of a map are much alike, and :math:`e^\top h_l` follows
        what they have in common; the readout that predicts best is the one without it.
    ridge: added to :math:`C_l`, as a part of the mean variance of a channel.
    orthogonal: send by the orthogonal matrix next to `B`, not by `B`. The readout of one class is much like that of the next,
        for both follow what varies most in the activities; orthogonal signals tell classes apart.
    strength: of orthogonal signals.
    operator: the form of the feedback weights and how they start; one that can be learned. From zero, a site gets no
        signal in the first step and no random one later.
    derivative: the name of a function in place of the activations' derivative, as in :class:`DFA`. `B` learns from the
        activity :math:`h_l = f(a_l)` all the same.

    Webster, Choi & Ahn, "Learning the Connections in Direct Feedback Alignment", 2020 (OpenReview
    zgGmAx9ZcY). The authors' code starts B with `kaiming_uniform` in its CIFAR-10 net and with zeros in its
    AlexNet, and trains B by Adam with its own rate, decay and schedule (the recipe `published`), so the
    Kolen-Pollack condition of equal optimizers is not met there. An earlier variant of the authors, FB-DKP,
    used :math:`\nabla B_l = \tfrac12 e^\top h_l + \tfrac12 a_L^\top (e B_l)`; they dropped it, and it is
    not offered here. With a second update by predictive coding: :class:`DKPPC`. Feedback of fixed norm: :class:`GrAPE`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import torch.nn.functional as F
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.DKP(), example=x)
        >>> F.cross_entropy(learner(x), y).backward()
        >>> [tuple(B.grad.shape) for B in learner.feedback.parameters()]
        [(3, 8), (3, 8)]
    """

    center: bool = False
    whiten: bool = True
    ridge: float = 0.1
    orthogonal: bool = True
    strength: float = 0.1
    operator: Operator = Auto("zeros")
    derivative: str | None = None

    name = "dkp"
    label = "DKP"
    paper = "Webster et al. 2020"
    unlocked = "backward"
    learned = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ridge > 0:
            raise AttachError(
                f"{self.label}'s ridge is {self.ridge}: it must be above 0, for channels may be copies of each other."
            )

    @classmethod
    def published(cls, **changes: Any) -> DKP:
        """The authors' form: activities as they are, a plain gradient, `B` from `kaiming_uniform`."""
        return replace(
            cls(center=False, whiten=False, orthogonal=False, operator=Dense()), **changes
        )

    @property
    def least_batch(self) -> int:
        return 2 if self.center else 1

    @property
    def form(self) -> Operator:
        """The operator of its edges."""
        return Orthogonal(self.operator, self.strength) if self.orthogonal else self.operator

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        return star(sites, source, self.form)

    def feedback_grad(self, edge: Edge, weights: Weights, d: Tensor, h: Tensor) -> Weights:
        h, center = activity(edge, h), self.center
        if self.whiten and has_places(edge.site, h):
            d, h = whitened(edge.site, d, h, center, self.ridge)
            center = False  # it is done
        return edge.operator.correlate(weights, d, h, center)
