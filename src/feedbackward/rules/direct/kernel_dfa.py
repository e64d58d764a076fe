"""Direct feedback alignment with feedback of the convolutions' kernels' shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from feedbackward.graph import Edge, Graph, LayerInput, Site, Source
from feedbackward.operators import Dense, LayerKernel, Operator
from feedbackward.rule import Rule, refuse_zeros
from feedbackward.rules.direct.dfa import DFA


@dataclass(frozen=True)
class KernelDFA(Rule):
    r"""DFA in the form that published comparisons on convolutional nets use: `B` has a kernel's shape, not a map's.

    .. math::
        \delta h_{l-1} = \mathrm{conv2d\_input}(B_l,\ e\, 1_{H_l \times W_l}) \quad \text{(convolution)}, \qquad
        \delta h_{l-1} = e\, B_l \quad \text{(linear)}

    with `B_l: [C, c_{l-1}, k, k]`, the error `e: [N, C]` repeated over the convolution's output map of H x W, and the layer's own
    stride, padding and dilation; `B_l: [C, n_{l-1}]` for a linear layer. Far less memory than `[C, c H W]`, but the signal is
    constant over space except at borders. It is the signal for the *input* of the layer, as FA has it: every Linear or
    convolution after the first, and skip paths stay whole, so signals add up where they meet.

    init, scale: of the kernels, see :class:`LayerShaped`; those of linear layers start as DFA's.

    Sanfiz & Akrout, "Benchmarking the accuracy and robustness of feedback alignment algorithms", 2021 (arXiv:2108.13446), and its
    package BioTorch; the rule is Nokland's (2016). Their recipe is Adam with 1e-3. Ours ignores the groups of a convolution:
    `B` reaches all its input channels; and treats transposed convolutions alike (both inferred).

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
    properties = replace(DFA.properties, extra_memory="W C/c", extra_compute="D C/c - D")

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
