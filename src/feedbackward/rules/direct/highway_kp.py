"""Highway Kolen-Pollack."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

from feedbackward.activity import LayerInput, Site, Source
from feedbackward.errors import AttachError
from feedbackward.graph import Branches, Graph
from feedbackward.operators.layer import LayerShaped
from feedbackward.rule import Rule
from feedbackward.topologies import chain


@dataclass(frozen=True)
class HighwayKP(Rule):
    r"""Highway Kolen-Pollack: errors travel the skip paths of a residual net, and at most `branches` of its branches.

    .. math::
        h_i = f(S_i h_{i-1} + F_i(h_{i-1})), \qquad
        w^k_{i-1} = S_i^\top (f' w^k_i) + F_i^{B\top} (f' w^{k-1}_i), \qquad w^{-1} = 0, \qquad
        \nabla B = \nabla W

    :math:`w^k_i` is the error at the output of block i along all paths that pass k branches or fewer; skip paths
    :math:`S_i` (identities, paddings, averages) hold no weights, :math:`F^{B\top}` is the branch's backward with learned feedback
    `B` in place of each W, and the gradients of block i are made from :math:`w^k_i`. All branches run at once: with two layers
    in a branch an error meets 2 + 2k products in sequence, whatever the depth. With k = 0 it is the sum of what the skip paths
    carry; with k = the number of branches it is :class:`KolenPollack`, and with B = W backprop.

    `B` starts as what the layer's response to noise says of its weight (:class:`LayerShaped`, `mirrored`) and gets W's own
    gradient, so with one optimizer, rate and decay for both it only draws nearer. Attach to a model that has its weights.

    A branch is the side of a sum with more products than the other, which has none, or one (a projection; a layer more in the
    sequence). It must begin with a module. Signals are the nearer to backprop's the smaller the branches are beside the skip paths:
    start the scale of each branch's last norm, or its last layer, at zero.

    On a net without branches it is :class:`KolenPollack`, and says so.

    branches: k. init: of `B`; another one than "mirrored" leaves it at a distance from W that only decay shrinks.

    Ours, of Fagnou, Caillon, Delattre & Allauzen, "Accelerated training through iterative gradient propagation along the
    residual path" (Highway-BP, ICLR 2025), which transports W, and Kolen & Pollack 1994. One process computes the sweeps one
    after another, so `branches` of them cost as many more backward passes of signals.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import torch.nn.functional as F
        >>> import feedbackward as fb
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.f = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        ...     def forward(self, x):
        ...         return x + self.f(x)
        >>> model = nn.Sequential(nn.Linear(4, 8), Block(), Block(), nn.Linear(8, 3))
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> learner = fb.attach(model, fb.rules.HighwayKP(branches=1), example=x)
        >>> F.cross_entropy(learner(x), y).backward()
        >>> all(B.grad is not None for B in learner.feedback.parameters())
        True
    """

    branches: int = 2
    init: str = "mirrored"

    name = "highway_kp"
    label = "Highway KP"
    paper = "ours"
    feeds = LayerInput
    learned = True
    one_rate = True

    def __post_init__(self) -> None:
        if self.branches < 0:
            raise AttachError(f"{self.label} needs branches >= 0, got {self.branches}.")

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        graph = chain(sites, lambda layer: LayerShaped(layer.form, self.init), shared=True)
        starts = [b for site in sites if isinstance(site, LayerInput) for b in site.branches]
        unclear = [branch for branch in starts if isinstance(branch, str)]
        if unclear:
            raise AttachError(
                f"{self.label} cannot hold back {unclear[0]}: it does not begin with a module, so there is no place for a hook. "
                "Make its first operation a module (nn.LayerNorm for F.layer_norm, nn.ReLU for F.relu)."
            )
        if not starts:
            warnings.warn(
                f"{self.label} follows skip paths, and no sum here has a side with fewer products than the other: on this net it "
                "is KolenPollack, whose layers wait for each other. For a plain net use SegmentedKP or DKP.",
                stacklevel=2,
            )
            return graph
        inputs = tuple(branch for branch in starts if isinstance(branch, Site))
        return replace(graph, branches=Branches(source, inputs, self.branches))
