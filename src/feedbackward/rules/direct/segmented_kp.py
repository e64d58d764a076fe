"""Segmented Kolen-Pollack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from feedbackward.activity import LayerInput, Site, Source
from feedbackward.errors import AttachError
from feedbackward.graph import Edge, Graph
from feedbackward.operators import Auto, Operator, Weights
from feedbackward.operators.layer import LayerShaped
from feedbackward.rule import Rule
from feedbackward.rules.direct.dkp import DKP
from feedbackward.topologies import segments


@dataclass(frozen=True)
class SegmentedKP(Rule):
    r"""Segmented Kolen-Pollack: the layers in segments; DKP carries the error to each, and Kolen-Pollack through it.

    .. math::
        \delta h_l = \begin{cases}
        \mathrm{strength} \cdot e\, (B_l B_l^\top)^{-1/2} B_l & \text{at the top of a segment, as in DKP} \\
        \delta a_l\, B_l & \text{elsewhere, as in KP}
        \end{cases}

    :math:`h_l` is the input of a layer and :math:`\delta a_l` the error of its output. A segment has at most `steps` layer
    inputs, so a backward pass takes `steps` products in sequence, whatever the depth is, and the segments run at once. The
    highest begins at the output and is a chain, so a net of no more layer inputs than `steps` trains by
    :class:`KolenPollack`. No forward weight is used.

    Feedback within a segment begins mirrored and gets the gradients of the forward weights (:class:`KolenPollack`); feedback
    that enters one is learned from the error and the activity (:class:`DKP`). One optimizer and one rate serve all weights.
    :func:`feedbackward.parallel.pipeline` divides the model at the tops of segments: no process waits for another's gradients.

    steps: the most products in sequence. A segment ends only below a layer that no other path bypasses, so it may be shorter.
    strength, operator: of the signals that enter segments, as in :class:`DKP`.
    init: of the feedback within segments, see :class:`LayerShaped`.

    This rule is ours, after Webster, Choi & Ahn 2020 and Kolen & Pollack 1994. :class:`RelayedKP` divides the layers likewise.
    There a segment hears from the one above it, and its layers through estimated paths.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import torch.nn.functional as F
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.SegmentedKP(steps=1), example=x)
        >>> F.cross_entropy(learner(x), y).backward()
        >>> [(edge.source.name, edge.site.name) for edge in learner.graph.edges]
        [('4', '2.input'), ('4', '4.input')]
    """

    steps: int = 5
    strength: float = 0.1
    operator: Operator = Auto("zeros")
    init: str = "mirrored"

    name = "segmented_kp"
    label = "Segmented KP"
    paper = "ours"
    feeds = LayerInput
    learned = True
    one_rate = True

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise AttachError(f"{self.label} needs steps >= 1, got {self.steps}.")

    @property
    def _entry(self) -> DKP:
        return DKP(strength=self.strength, operator=self.operator)

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        return segments(
            sites,
            source,
            self.steps,
            self._entry.form,
            lambda layer: LayerShaped(layer.form, self.init),
        )

    def feedback_grad(self, edge: Edge, weights: Weights, d: Tensor, h: Tensor) -> Weights:
        return self._entry.feedback_grad(edge, weights, d, h)
