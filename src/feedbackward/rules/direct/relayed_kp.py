"""Relayed Kolen-Pollack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from feedbackward.activity import LayerInput, Site, Source
from feedbackward.errors import AttachError
from feedbackward.graph import Graph
from feedbackward.operators import Dense, Operator
from feedbackward.operators.layer import LayerForm, LayerShaped
from feedbackward.rule import Rule
from feedbackward.topologies import relays

if TYPE_CHECKING:
    from feedbackward.engine.phase import Phase


@dataclass(frozen=True)
class RelayedKP(Rule):
    r"""Relayed Kolen-Pollack: a few layers relay the error. Each feeds the layers down to the next relay, by learned edges.

    .. math::
        \delta h_l = d_r\, B_l, \qquad
        \nabla B_l = \begin{cases} \nabla W_r = d_r^\top h_l & \text{over the relay's own layer} \\
        B_l - \hat J_l & \text{over more layers} \end{cases}, \qquad
        \hat J_l = \tfrac1M\, (\textstyle\sum_{k} J_k u_k)^\top u_l, \quad u: [M, n_l] \sim \mathcal N(0, 1)

    :math:`h_l` is the input of a layer, and :math:`d_r` the error of the pre-activation of the relay r above it.
    :math:`J_l = \partial a_r / \partial h_l` is the Jacobian of each sample, and k are the inputs that r feeds over more layers
    than its own. The output is the first relay. The error of another relay is what the relay above sent to the input of the
    next layer, taken through the norm and activation between. So a backward pass takes `steps` products in sequence, whatever
    the depth is. No forward weight is used, not even the head's.

    Over one layer, `B_l` has that layer's shape. It begins as an estimate of the weight from the layer's response to noise
    (:class:`LayerShaped`, `mirrored`), and then gets the weight's own gradient (:class:`KolenPollack`). With the same
    optimizer, rate and decay for both, :math:`W_r - B_l` only shrinks, so these edges have neither noise nor lag. Attach to a
    model that already has its weights.

    Over more layers, `B_l` is a convolution kernel of side `size` between maps, and a matrix to and from vectors. If pools lie
    between, the kernel has a stride, and :math:`\hat J_l` is averaged over the places of the map. If the path is linear, the
    mean of :math:`\hat J_l` is the path's own map (as far as the kernel reaches), so B converges to it, and the signals to
    backprop's. Over ReLUs and pools it is the mean Jacobian, which keeps half of the signal's energy for each ReLU. With as
    many `steps` as layers, no edge passes over a layer, and the signals are backprop's up to what is left of the first
    :math:`W_r - B_l`. `fb.Delayed(learner, steps=5)` then bounds the products that an update waits for.

    Call `learner.feedback_step(x)` after every backward pass, before the optimizer steps. It takes one forward-mode pass of
    the first `samples` inputs. A movement ends at its relay, so that the estimates of different relays do not disturb each
    other. Update `B` with the optimizer and rates of W. Do not scale the gradient of `B` with the loss.

    steps: the most products in sequence: R + 1 for R relays besides the output. A net with fewer layers takes fewer.
    size: the side of kernels that pass over layers.
    samples: M. The noise in an estimate is about sqrt(inputs of the path / (M places)) times the weights.
    init: of the edges over one layer. Others than "mirrored" begin at a distance from the weights that only decay shrinks.

    This rule is ours, after Kolen & Pollack 1994, Akrout et al. 2019 (:class:`WeightMirror`) and Bacho & Chu 2024
    (:class:`FDFA`). Relays are layers that no skip connection bypasses. In a residual net these are only the layers before the
    first block and after the last one, so the runs are long.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import torch.nn.functional as F
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.rules.RelayedKP(steps=1), example=x)
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
    learned = True
    one_rate = True

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
