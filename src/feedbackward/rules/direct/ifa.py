"""Indirect feedback alignment."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from feedbackward.activity import Site, Source
from feedbackward.graph import Edge, Graph, UpwardEdge
from feedbackward.operators import Dense, Operator
from feedbackward.rule import Rule, refuse_zeros


@dataclass(frozen=True)
class IFA(Rule):
    r"""Indirect feedback alignment: the output error goes to the first site, and from there upwards to the others.

    .. math::
        \delta h_1 = e\, B_1, \qquad \delta h_{l+1} = \delta a_l\, W_{l+1}^\top, \quad \delta a_l = \delta h_l \odot f'(a_l), \qquad
        B_1\ \text{fixed}: [C, n_1]

    The forward weights are used in their forward direction, as the next forward pass uses them, so nothing is transported.
    The sites must be a plain chain: each is made from the one below alone, by layers whose last output :math:`a_l` has the
    shape of the site. Norms and pools on the way are differentiated as well:
    :math:`\delta h_{l+1} = \partial a_{l+1} / \partial a_l\, \delta h_l`, which is the equation above for activations that work
    unit by unit. A pool must lie above its site; in a net with pools, name the activations as sites.

    The forward derivative is computed by differentiating twice inside the forward pass. This takes memory and time that the
    rule itself would not take. The signals wait for each other, and neither replay nor `fullgraph` compilation is possible.

    The update of :math:`W_{l+1}` is proportional to :math:`W_{l+1}` itself, which may therefore grow. Bounded activations (the
    paper's tanh) limit this. With ReLU we needed small rates, and on convolutions the rule did not beat Frozen.

    operator: the form of the feedback weights of the first site, and their initial values.

    Nokland, "Direct Feedback Alignment Provides Learning in Deep Neural Networks", NeurIPS 2016 (arXiv:1609.01596), which has
    fully connected tanh networks and draws `B` uniformly. Everything about norms, pools and convolutions is inferred.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> layers = [nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)]
        >>> model = nn.Sequential(*layers)
        >>> learner = fb.attach(model, fb.rules.IFA(), example=x)
        >>> nn.functional.cross_entropy(learner(x), y).backward()
        >>> [edge.site.name for edge in learner.graph.edges]  # only the first site is fed directly
        ['1']
    """

    operator: Operator = Dense()

    name = "ifa"
    label = "IFA"
    paper = "Nokland 2016"

    def __post_init__(self) -> None:
        refuse_zeros(self.label, self.operator)

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        upward = tuple(UpwardEdge(below, above) for below, above in itertools.pairwise(sites))
        return Graph(tuple(sites), (Edge(source, sites[0], self.operator),), upward=upward)
