"""Direct feedback within the modules of a network, by dilated convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from feedbackward.activity import Site, Source
from feedbackward.errors import AttachError
from feedbackward.graph import Graph
from feedbackward.operators import Dense, Kernel, Operator, PerShape
from feedbackward.rule import Rule
from feedbackward.topologies import modules


@dataclass(frozen=True)
class Han2020(Rule):
    r"""DFA within modules, backprop from module to module, and dilated convolutions as direct connections.

    .. math:: \delta h_i = \mathrm{conv}^\top(\delta h_o,\ B_i;\ \mathrm{dilation}\ o - i), \qquad
        B_i: [c_o, c_i / g, 3, 3]\ \text{fixed}

    for the output `h_o` of a module and each of its inner layers i < o. A 3x3 kernel with dilation o - i covers the receptive
    field of o - i layers of 3x3. This sparse kernel replaces the dense `[c_o H W, c_i H W]` of a direct connection.

    A module is a stage: consecutive sites whose maps have the same size. Its output is its last site. That site is not cut:
    its error comes from the lowest inner site of the module above, by backprop through the layers between them. The last
    module ends with the network's output, whose error goes to all its sites, through dense feedback to the fully connected
    ones. So backprop trains a stage with one site, and DFA a network without maps, unless `most` cuts it into modules.

    most: the largest number of sites in a module. Larger stages are divided from the top. With 0 stages stay whole.
    groups: the groups of the kernels, which must divide the channels.

    Han, Park, Ryu & Yoo, "Extension of Direct Feedback Alignment to Convolutional and Recurrent Neural Network for Bio-plausible
    Deep Learning", 2020 (arXiv:2006.12830), also on recurrent networks, which are left out here. We have read the abstract,
    which names modules, dilated and group convolutions, and a hybrid with backprop. Inferred: what a module is, that backprop
    connects modules, and the size, dilation and initialisation of the kernels (signals of DFA's norm).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(8, 1, 8, 8), torch.randint(3, (8,))
        >>> def block(channels):
        ...     return [nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU()]
        >>> convs = [*block(1), *block(4), *block(4)]
        >>> model = nn.Sequential(*convs, nn.Flatten(), nn.Linear(256, 3))
        >>> learner = fb.attach(model, fb.rules.Han2020(), example=x)
        >>> nn.functional.cross_entropy(learner(x), y).backward()
        >>> [site.name for site in learner.graph.sites]  # '3' is the output of the first module
        ['1', '6']
    """

    most: int = 0
    groups: int = 1

    name = "han2020"
    label = "Han 2020"
    paper = "Han et al. 2020"
    transport = "between modules"

    def __post_init__(self) -> None:
        if self.most < 0:
            raise AttachError(
                f"{self.label} needs most >= 0 sites per module (0: whole stages), got {self.most}."
            )

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        stages = [list(stage) for _, stage in groupby(sites, _space)]
        most = self.most or len(sites)
        divided = [
            stage[max(end - most, 0) : end]
            for stage in stages
            for end in sorted(range(len(stage), 0, -most))
        ]
        return modules(divided, source, self._form)

    def _form(self, skipped: int) -> Operator:
        return PerShape(maps=Kernel(3, dilation=skipped, groups=self.groups), vectors=Dense())


def _space(site: Site) -> tuple[int, ...]:
    """The size of a map; of vectors and tokens, nothing."""
    return () if site.tokens else site.shape[1:]
