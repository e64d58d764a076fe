"""Local representation alignment, error-driven."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from feedbackward.activity import LayerInput, PreActivation, Site, Source
from feedbackward.errors import AttachError
from feedbackward.graph import Edge, Graph
from feedbackward.operators.base import widened
from feedbackward.operators.layer import LayerShaped
from feedbackward.rule import Rule


@dataclass(frozen=True)
class LRA(Rule):
    r"""LRA-E: error synapses move each layer's pre-activation, and the activation's change is the layer's error.

    .. math::
        d_{l-1} = \beta\, e_l E_l, \qquad t_{l-1} = f(a_{l-1} - d_{l-1}), \qquad e_{l-1} = f(a_{l-1}) - t_{l-1}, \qquad
        \nabla W_l = \tfrac1N e_l^\top h_{l-1}, \qquad \nabla E_l = \gamma\, \nabla W_l

    from :math:`e_L = \partial \mathrm{Loss} / \partial a_L` of each sample. There is no :math:`f'`. The difference of the
    activations takes its place; :math:`f'(a) \odot d` is its first-order term. `E_l` has the shape of `W_l` and gets its gradient;
    :math:`\gamma` is the ratio of the two learning rates. The feedback of a convolution has the form of its kernel.

    The network must be a plain chain of layers with at most one elementwise activation module between two of them, as in the
    papers. Norms, pools, dropout and skip paths are refused.

    beta: how far a target goes. It is 0.1 in the authors' code.
    init, scale: of `E`, see :class:`LayerShaped`. The authors' code has `init="normal"`, N(0, 1), which suits narrow
        tanh layers: the error grows with the square root of the width, and explodes in layers of 1000 ReLU
        units. The default keeps the size of the error.

    Ororbia & Mali, "Biologically Motivated Algorithms for Propagating Local Target Representations", AAAI 2019
    (arXiv:1805.11703). The gradient of `E` is that of the authors' code, where :math:`\gamma = 1`. In the paper `E`
    learns by a transposed delta rule. The authors' option to normalise updates is not offered.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.rules.LRA(), example=x)
        >>> nn.functional.cross_entropy(learner(x), y).backward()
        >>> B = learner.feedback_of(learner.graph.edges[0])
        >>> torch.equal(B.grad, model[2].weight.grad)
        True
    """

    beta: float = 1.0
    init: str = "xavier_uniform"
    scale: float = 1.0

    name = "lra"
    label = "LRA-E"
    paper = "Ororbia & Mali 2019"
    feeds = LayerInput
    receives = True
    linear = False
    learned = True
    one_rate = True

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise AttachError(f"LRA-E's targets need a beta above 0, got {self.beta}.")

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        below: dict[PreActivation, LayerInput] = {}
        edges = []
        for layer_input in sites:
            assert isinstance(layer_input, LayerInput)
            layer = layer_input.source.name
            if isinstance(layer_input.below, str):
                raise AttachError(
                    f"{self.label} needs one elementwise activation module, and nothing else, between two layers: before layer "
                    f"{layer!r} stands {layer_input.below}. Take it out, or use KP, which differentiates what lies between."
                )
            if layer_input.below in below:
                raise AttachError(
                    f"{self.label} goes from layer to layer, but the output of {layer_input.below.name!r} enters both "
                    f"{below[layer_input.below].source.name!r} and {layer!r}. Use KP."
                )
            below[layer_input.below] = layer_input
            operator = LayerShaped(layer_input.form, self.init, self.scale)
            edges.append(
                Edge(layer_input.source, layer_input.below, operator, shares=layer_input.weight)
            )
        return Graph(tuple(below), tuple(edges))

    def message(
        self, edge: Edge, d: Tensor, target: Tensor | None, activity: Tensor | None
    ) -> Tensor:
        return self.beta * d

    def receive(self, edge: Edge, sent: Tensor, h: Tensor) -> Tensor:
        assert isinstance(edge.site, PreActivation)
        f = edge.site.activation
        a, d = (widened(t) for t in (h, sent))
        n = len(d)  # the error of a mean loss carries 1/N
        return (f(a) - f(a - n * d)) / n
