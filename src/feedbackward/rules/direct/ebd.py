"""Error broadcast and decorrelation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from feedbackward.activity import Site, Source
from feedbackward.errors import AttachError
from feedbackward.graph import Edge, Graph
from feedbackward.operators import Dense, Operator, Weights
from feedbackward.rule import Rule
from feedbackward.topologies import star


@dataclass(frozen=True)
class EBD(Rule):
    r"""Error broadcast and decorrelation: the feedback is the running correlation of activity and error.

    .. math::
        B_l \leftarrow \lambda B_l + (1 - \lambda)\, e^\top h_l, \qquad \delta h_l = e\, B_l \qquad (B_l = R_l^\top: [C, n_l]),
        \qquad \nabla B_l = \mathrm{forget} \cdot (B_l - e^\top h_l)

    The error of the best estimator has no correlation with the activities. The signal descends this correlation,
    :math:`\tfrac12 \lVert R_l \rVert^2`, through :math:`h_l` for a fixed error. `e` carries the 1/N of a mean loss, so
    :math:`e^\top h_l` is a batch mean. Under plain SGD for B with the rate :math:`\eta`, :math:`1 - \lambda` is
    :math:`\eta \cdot \mathrm{forget}`; a momentum m makes it 1 / (1 - m) times as large. The published :math:`\lambda` is
    0.99999, which is what SGD at 0.02 with momentum 0.9 makes of the default. Adam takes no notice of `forget`: give B SGD
    there, or a rate of 1e-6.

    About the sign: in :math:`e\, e^\top h` the error counts twice, so either sign is possible. DKP's feedback is *minus* a sum
    of the same :math:`e^\top h_l`, and so are output weights trained by gradient descent. A `B` that is all correlation
    therefore sends the opposite of what trains the layers below a head that descends the loss. With a small
    :math:`1 - \lambda`, `B` stays near its random start, and EBD is DFA with a drift; with a larger one it fails
    (bench/results/low_rules.md has both). :class:`Flipped` reverses the signals (`Flipped(EBD())`). This is not in the paper,
    but near DKP with a short memory.

    operator: the form of the feedback weights, which must be learnable, and their initial values.
    forget: how fast B turns to the correlation, as a part of its learning rate.

    Erdogan, Pehlevan & Erdogan, "Error Broadcast and Decorrelation as a Potential Artificial and Natural Learning Mechanism",
    2025 (arXiv:2504.11558). We had neither the paper's text nor the authors' code. The equations are from descriptions, and the
    start of `B` is inferred. The function of the activity is the activity itself. The power and entropy regularisers of the
    layers, which keep activities from collapsing, and the error's own dependence on the weights are left out.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.rules.EBD(), example=x)
        >>> nn.functional.cross_entropy(learner(x), y).backward()
        >>> [tuple(B.grad.shape) for B in learner.feedback.parameters()]
        [(3, 8)]
    """

    operator: Operator = Dense()
    forget: float = 5e-5

    name = "ebd"
    label = "EBD"
    paper = "Erdogan et al. 2025"
    linear = False
    unlocked = "backward"
    learned = True

    def __post_init__(self) -> None:
        if not 0 < self.forget <= 1:
            raise AttachError(
                f"{self.label}'s forget is {self.forget}: it must be above 0, at most 1."
            )

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        return star(sites, source, self.operator)

    def feedback_grad(self, edge: Edge, weights: Weights, d: Tensor, h: Tensor) -> Weights:
        correlation = edge.operator.correlate(weights, d, h, center=False)
        own = edge.operator.decay(weights, edge.source_shape, edge.site_shape)
        return tuple(
            self.forget * (b.to(r.dtype) - r) for b, r in zip(own, correlation, strict=False)
        )
