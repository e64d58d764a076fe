"""Product feedback alignment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from feedbackward.activity import LayerInput, Site, Source
from feedbackward.errors import AttachError
from feedbackward.graph import Graph
from feedbackward.operators.layer import LayerShaped
from feedbackward.operators.product import PRODUCT_KINDS, Product
from feedbackward.rule import Rule
from feedbackward.topologies import chain


@dataclass(frozen=True)
class PFA(Rule):
    r"""Product feedback alignment: the product of a fixed and a learned feedback matrix comes near the forward weights.

    .. math::
        \delta h_{l-1} = (\delta a_l\, B_l)\, R_l, \qquad
        \nabla R_l = B_l^\top \nabla W_l = (\delta a_l B_l)^\top h_{l-1}, \qquad B_l: [n_l, m]\ \text{fixed},\ R_l: [m, n_{l-1}]

    With the same optimizer, rate and weight decay for both, :math:`R_l - B_l^\top W_l` shrinks as :math:`(1 - \eta\lambda)^t` under
    plain SGD. Then :math:`B_l R_l \to B_l B_l^\top W_l`. This has nearly the direction of :math:`W_l` if :math:`B_l B_l^\top` is
    nearly the identity, that is for m well above :math:`n_l`. Without weight decay the initial R never fades. For a
    convolution `B` mixes channels at each position, inside the layer's groups, and `R` is a kernel of the layer's geometry.

    The gradient of R is made from that of W, without a second sum over the batch.

    expand: :math:`m / n_l`, for a random B.
    kind: the fixed B. `"random"`: uniform with :math:`E[B B^\top] = 1`; `"orthogonal"`; or `"identity"`, which is Kolen-Pollack.
    init, scale: of R, see :class:`LayerShaped`.

    Li & Benna, "Deep Learning without Weight Symmetry", 2024 (arXiv:2405.20594), expand 10 in the authors' configurations. They
    decay all weights much more at the start (by 0.03 or 5e-3, and by a thousandth or a fiftieth of that after the first epoch),
    and compute :math:`(\delta a_l B_l)^\top h_{l-1}`. Their B for grouped convolutions mixes all groups; here it respects them
    (inferred).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.rules.PFA(expand=10), example=x)
        >>> nn.functional.cross_entropy(learner(x), y).backward()
        >>> R, B = learner.weights_of(learner.graph.edges[0])
        >>> torch.allclose(R.grad, B[0].T @ model[2].weight.grad)
        True
    """

    expand: int = 10
    kind: str = "random"
    init: str = "xavier_uniform"
    scale: float = 1.0

    name = "pfa"
    label = "PFA"
    paper = "Li & Benna 2024"
    feeds = LayerInput
    learned = True
    one_rate = True

    def __post_init__(self) -> None:
        if self.expand < 1 or self.kind not in PRODUCT_KINDS:
            raise AttachError(
                f"PFA needs expand >= 1 and a kind out of {', '.join(PRODUCT_KINDS)}, got {self.expand} and {self.kind!r}."
            )

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        expand = self.expand if self.kind == "random" else 1

        def product(layer_input: LayerInput) -> Product:
            return Product(LayerShaped(layer_input.form, self.init, self.scale), expand, self.kind)

        return chain(sites, product, shared=True)
