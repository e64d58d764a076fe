"""Relayed Kolen-Pollack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from feedbackward.errors import AttachError
from feedbackward.graph import Graph, LayerInput, Site, Source
from feedbackward.operators import Dense, Operator
from feedbackward.operators.layer import LayerForm, LayerShaped
from feedbackward.rule import Properties, Rule
from feedbackward.topologies import relays

if TYPE_CHECKING:
    from feedbackward.engine.phase import Phase


@dataclass(frozen=True)
class RelayedKP(Rule):
    r"""Relayed Kolen-Pollack: a few layers relay the error; each feeds those below it, down to the next relay, by learned edges.

    .. math::
        \delta h_l = d_r\, B_l, \qquad
        \nabla B_l = \begin{cases} \nabla W_r = d_r^\top h_l & \text{over the relay's own layer} \\
        B_l - \hat J_l & \text{over more layers} \end{cases}, \qquad
        \hat J_l = \tfrac1M\, (\textstyle\sum_{k} J_k u_k)^\top u_l, \quad u: [M, n_l] \sim \mathcal N(0, 1)

    :math:`h_l` is the input of a layer, :math:`d_r` the error of the pre-activation of the relay r above it,
    :math:`J_l = \partial a_r / \partial h_l` of each sample, k the inputs that r feeds over more layers than its own. The output
    is the first relay; a relay's own error is what the relay above sent to the input of the layer over it, through the norm and
    activation between. So a pass back takes `steps` products in sequence, whatever the depth, and no forward weight is used: the
    learned edge from the output feeds the last hidden layer as well.

    Over one layer `B_l` has that layer's shape. It begins as what the layer's response to noise says of its weight
    (:class:`LayerShaped`, `mirrored`) and then gets the weight's own gradient (:class:`KolenPollack`), so that with the same
    optimizer, rate and decay for both :math:`W_r - B_l` only shrinks: these edges have neither noise nor lag. Attach to a model
    that has its weights.

    Over more layers `B_l` is a convolution kernel between maps, of side `size`, strided where poolings lie between (then
    :math:`\hat J_l` is averaged over the places of the map), and a matrix to and from vectors. Where the path is linear, `E[J_hat]` is
    the path's own map (as far as the kernel reaches it), so that B converges to it and the signals to backprop's. Over ReLUs
    and poolings it is the mean Jacobian: of each ReLU that an edge passes over, the mean keeps the half of the signal's energy that
    does not depend on the sample. With as many `steps` as layers no edge passes over any, and the signals are backprop's
    up to what is left of the first :math:`W_r - B_l`: `fb.Delayed(learner, steps=5)` then bounds
    the products that an update waits for.

    Call `learner.feedback_step(x)` after every backward pass, before the optimizer steps: one forward-mode pass of the first
    `samples` inputs, in which the movement of a site ends at its relay, so that the estimates of different relays do not disturb
    each other. Update `B` by W's own optimizer and rates. Do not scale `B`'s gradient with the loss.

    steps: most products in sequence, R + 1 for R relays besides the output; a net with fewer layers takes fewer.
    size: side of the kernels that pass over layers.
    samples: M. The noise in an estimate is about sqrt(inputs of the path / (M places)) times the weights.
    init: of the edges over one layer; another one than "mirrored" leaves them at a distance from the weights that only decay shrinks.

    Ours, of Kolen & Pollack 1994, Akrout et al. 2019 (:class:`WeightMirror`) and Bacho & Chu 2024 (:class:`FDFA`). Relays are
    layers that no skip connection leads round: in a residual net only those before the first and after the last block are, so that
    the runs are long.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import torch.nn.functional as F
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.RelayedKP(steps=1), example=x)
        >>> F.cross_entropy(learner(x), y).backward()
        >>> learner.feedback_step(x)  # before the optimizer steps
        >>> all(B.grad is not None for B in learner.feedback.parameters())
        True
    """

    steps: int = 5
    size: int = 5
    samples: int = 32
    init: str = "mirrored"

    name = "relayed_kp"
    label = "Relayed KP"
    paper = "ours"
    feeds = LayerInput
    in_phase = True
    properties = Properties(
        backward_unlocked=True,
        update_unlocked=False,
        forward_unlocked=False,
        weight_transport=False,
        learned_feedback=True,
        backward_steps="steps",
        extra_memory="W (size / 3)^2 + opt.",
        extra_compute="2 forward passes x samples / N",
    )

    def __post_init__(self) -> None:
        for name in ("steps", "size", "samples"):
            if getattr(self, name) < 1:
                raise AttachError(f"{self.label} needs {name} >= 1, got {getattr(self, name)}.")

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        return relays(sites, self.steps, self._operator, shared=True)

    def _operator(self, relay: Source, layer_input: LayerInput) -> Operator:
        if relay == layer_input.source:
            return LayerShaped(layer_input.form, self.init)
        if len(relay.shape) == len(layer_input.shape) > 1 and not relay.tokens:
            return LayerShaped(
                LayerForm.between(relay.shape, layer_input.shape, self.size), "zeros"
            )
        return Dense("zeros")

    def feedback_step(self, phase: Phase) -> None:
        far = phase.part([edge for edge in phase.edges if edge.shares is None], self.samples)
        for edge, moves, noise in far.perturbed() if far.edges else ():
            with torch.no_grad(), torch.autocast(moves.device.type, enabled=False):
                (B,) = phase.weights(edge)
                phase.give(edge, (B - edge.operator.average(B, moves, noise),))
