"""Convolutional direct feedback alignment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from feedbackward.activity import Site, Source
from feedbackward.errors import AttachError
from feedbackward.graph import Graph
from feedbackward.operators import Dense, Operator
from feedbackward.rule import Rule, refuse_zeros
from feedbackward.topologies import star


@dataclass(frozen=True)
class CDFA(Rule):
    r"""Convolutional DFA: the convolutions learn by backprop, the fully connected layers by DFA.

    .. math::
        \delta h_l = e\, B_l \quad (h_l\ \text{the flattened feature map, or a fully connected layer's activity}), \qquad
        \delta h_{l-1} = \delta a_l\, W_l \quad (\text{below the feature map})

    The classifier's signals do not wait for each other. The error enters the convolutions as `e B` of the flattened map,
    `B: [C, c H W]`, and goes down through them exactly. So the network is cut at the first site that is not a map (with one
    feature dimension besides tokens) and at every site after it. In a network without maps it is DFA.

    operator: the form of the feedback weights, and their initial values. :class:`Binary` is the paper's binary feedback.

    Han & Yoo, "Efficient convolutional neural network training with direct feedback alignment", 2019 (arXiv:1901.01986; ICCV
    workshops 2019, where it is combined with binary feedback, :class:`BinaryDFA`). We have read the abstract only. Inferred: that the
    signal of the feature map is DFA's, and the initialisation, which is DFA's. The paper proposes statistics for it.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 1, 6, 6), torch.randint(3, (16,))
        >>> model = nn.Sequential(
        ...     nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)
        ... )
        >>> learner = fb.attach(model, fb.rules.CDFA(), example=x)
        >>> nn.functional.cross_entropy(learner(x), y).backward()
        >>> [site.name for site in learner.graph.sites]  # the flattened map, and above
        ['2', '4']
    """

    operator: Operator = Dense()

    name = "cdfa"
    label = "CDFA"
    paper = "Han & Yoo 2019"
    transport = True

    def __post_init__(self) -> None:
        refuse_zeros(self.label, self.operator)

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        vectors = [i for i, site in enumerate(sites) if len(site.shape) - site.tokens == 1]
        if not vectors:
            raise AttachError(
                f"{self.label} sends the error to the flattened feature map and the layers after it, but every site here is a map "
                f"({sites[-1].name!r}: {list(sites[-1].shape)}). Name the flattened features as a site, or use DFA."
            )
        return star(sites[vectors[0] :], source, self.operator)
