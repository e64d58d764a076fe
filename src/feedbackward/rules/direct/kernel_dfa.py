"""Direct feedback alignment with feedback of the convolutions' kernels' shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from feedbackward.activity import LayerInput, Site, Source
from feedbackward.graph import Edge, Graph
from feedbackward.operators import Dense, LayerKernel, Operator
from feedbackward.rule import Rule, refuse_zeros


@dataclass(frozen=True)
class KernelDFA(Rule):
    r"""DFA as published comparisons on convolutional nets have it: `B` has the shape of a kernel, not of a map.

    .. math::
        \delta h_{l-1} = \mathrm{conv2d\_input}(B_l,\ e\, 1_{H_l \times W_l}) \quad \text{(convolution)}, \qquad
        \delta h_{l-1} = e\, B_l \quad \text{(linear)}

    For a convolution `B_l: [C, c_{l-1}, k, k]`. The error `e: [N, C]` is repeated over the output map of H x W, and goes back
    with the layer's own stride, padding and dilation. For a linear layer `B_l: [C, n_{l-1}]`. This takes far less memory
    than `[C, c H W]`, but the signal is constant over space except at borders. As in FA, the rule feeds the *input* of every
    Linear layer or convolution after the first. Skip paths stay whole, so signals add up where paths join.

    init, scale: of the kernels, see :class:`LayerShaped`. The feedback of linear layers starts as DFA's.

    Sanfiz & Akrout, "Benchmarking the accuracy and robustness of feedback alignment algorithms", 2021 (arXiv:2108.13446), and its
    package BioTorch; the rule is Nokland's (2016). Their recipe is Adam with 1e-3. Here `B` reaches all input channels of
    a convolution, whatever its groups are, and transposed convolutions are treated in the same way (both inferred).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(8, 1, 8, 8), torch.randint(3, (8,))
        >>> model = nn.Sequential(
        ...     nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)
        ... )
        >>> learner = fb.attach(model, fb.rules.KernelDFA(), example=x)
        >>> nn.functional.cross_entropy(learner(x), y).backward()
        >>> [tuple(B.shape) for B in learner.feedback.buffers()]
        [(3, 4, 3, 3), (3, 32)]
    """

    init: str = "xavier_uniform"
    scale: float = 1.0

    name = "kernel_dfa"
    label = "Kernel DFA"
    paper = "Sanfiz & Akrout 2021"
    feeds = LayerInput
    unlocked = "backward"

    def __post_init__(self) -> None:
        refuse_zeros(self.label, self)

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        return Graph(
            tuple(sites), tuple(Edge(source, site, self._operator(site)) for site in sites)
        )

    def _operator(self, layer_input: Site) -> Operator:
        assert isinstance(layer_input, LayerInput)  # what this rule feeds
        return (
            LayerKernel(layer_input.form, self.init, self.scale)
            if layer_input.form.stride
            else Dense()
        )
