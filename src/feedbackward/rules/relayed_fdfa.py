"""Relayed forward direct feedback alignment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..errors import AttachError
from ..graph import Arc, Edge, Graph, Site, Source, relays
from ..operators import Dense, Operator
from ..operators.layer import LayerForm, LayerShaped
from .base import Properties, Rule
from .weight_mirror import mean_product, mirrored

if TYPE_CHECKING:
    from ..phase import Phase


@dataclass(frozen=True)
class RelayedFDFA(Rule):
    r"""Relayed FDFA: a few layers relay the error; each feeds the layers below it, down to the next relay, by learned direct edges.

    .. math::
        \delta h_l = d_r\, B_l, \qquad \nabla B_l = B_l - \hat J_l, \qquad
        \hat J_l = \tfrac1M\, (J_l u_l + \textstyle\sum_{k} J_k u_k)^\top u_l, \quad u: [M, n_l] \sim \mathcal N(0, 1)

    :math:`h_l` is the input of a layer, :math:`d_r` the error of the pre-activation of the relay r above it,
    :math:`J_l = \partial a_r / \partial h_l` of each sample, k the other inputs that r feeds. The output is the first relay; a
    relay's own error is what the relay above sent to the input of the layer over it, through the norm and activation between.
    So a pass back takes `steps` products in sequence, whatever the depth, and no forward weight is used: the learned edge from
    the output feeds the last hidden layer as well.

    Between maps `B_l` is a convolution kernel, with the layer's own shape where the relay is the layer itself, and otherwise of side
    `size` from the relay's map to the input, strided where poolings lie between; :math:`\hat J_l` is then averaged over the
    places of the map. To and from vectors it is a matrix.

    Where the path from the input to the relay is linear, `E[J_hat]` is the path's own map (as far as the kernel reaches it), so that B
    converges to it and the signals to backprop's. Over ReLUs and poolings it is the mean Jacobian: of each ReLU that an edge
    passes over, the mean keeps the half of the signal's energy that does not depend on the sample.

    Call `learner.feedback_step(x)` after every backward pass, before the optimizers step. It mirrors the relays' own layers
    (:class:`WeightMirror`) from noise of 2 fan-in / places samples, and estimates the other edges in one forward-mode pass, in
    which the movement of a site ends at its relay, so that estimates of different relays do not disturb each other. Rates of
    `B` are like FDFA's: plain SGD with the rate :math:`\alpha` averages over the last :math:`1/\alpha` batches. Training is far
    better with constant rates of 0.05 to 0.1, no momentum and no decay for `B` than with W's optimizer. Do not scale `B`'s gradient
    with the loss.

    steps: most products in sequence, R + 1 for R relays besides the output; a net with fewer layers takes fewer.
    size: side of the kernels that pass over layers.

    Ours; the estimates are those of Bacho & Chu 2024 (:class:`FDFA`) and Akrout et al. 2019. Relays are layers that no skip
    connection leads round: in a residual net only those before the first and after the last block are, so that the runs are long.
    """

    steps: int = 5
    size: int = 5

    name = "relayed_fdfa"
    label = "Relayed FDFA"
    paper = "ours"
    feeds = Arc
    in_phase = True
    properties = Properties(
        backward_unlocked=True,
        update_unlocked=False,
        forward_unlocked=False,
        weight_transport=False,
        learned_feedback=True,
        backward_steps="steps",
        extra_memory="W (size / 3)^2 + opt.",
        extra_compute="2 forward passes",
    )

    def __post_init__(self) -> None:
        if self.steps < 1 or self.size < 1:
            raise AttachError(
                f"{self.label} needs steps >= 1 and size >= 1, got {self.steps} and {self.size}."
            )

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        return relays(sites, self.steps, self._operator)

    def _operator(self, relay: Source, arc: Arc) -> Operator:
        if relay == arc.source:
            return LayerShaped(arc.form, "zeros")
        if len(relay.shape) == len(arc.shape) > 1 and not relay.tokens:
            return LayerShaped(LayerForm.between(relay.shape, arc.shape, self.size), "zeros")
        return Dense("zeros")

    def feedback_step(self, phase: Phase) -> None:
        near = [edge for edge in phase.edges if _is_near(edge)]
        for edge in near:
            (B,) = phase.weights(edge)
            phase.give(edge, (B - mirrored(phase, edge, _samples(edge)),))
        far = phase.part([edge for edge in phase.edges if edge not in near])
        for edge, moves, noise in far.perturbed() if far.edges else ():
            with torch.no_grad(), torch.autocast(moves.device.type, enabled=False):
                (B,) = phase.weights(edge)
                phase.give(edge, (B - mean_product(edge.operator, B, moves, noise),))


def _is_near(edge: Edge) -> bool:
    """Whether the edge leads over its relay's own layer and nothing else."""
    return isinstance(edge.site, Arc) and edge.source == edge.site.source


def _samples(edge: Edge) -> int:
    """As many that what the estimate of a layer has of noise is half of what it has of the layer."""
    fan_in = math.prod(edge.operator.form.shape[1:])  # type: ignore[attr-defined]
    return math.ceil(2 * fan_in / math.prod(edge.source.shape[1:]))
