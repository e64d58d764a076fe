"""Simplified difference target propagation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from feedbackward.activity import Site, Source
from feedbackward.errors import AttachError
from feedbackward.graph import Edge, Graph
from feedbackward.operators.decoder import pair
from feedbackward.rules.targets.decoding import Laddered, reconstruct

if TYPE_CHECKING:
    from feedbackward.engine.phase import Phase


@dataclass(frozen=True)
class SDTP(Laddered):
    r"""Simplified difference target propagation: the output's target is the one-hot target, and no gradient is used.

    .. math::
        t_{L-1} = h_{L-1} - (g(p) - g(y)), \quad p = \mathrm{softmax}(a_L), \qquad
        t_l = h_l - (g_l(h_{l+1}) - g_l(t_{l+1})), \qquad \delta h_l = (h_l - t_l) / N

    :math:`\delta h_l` is the gradient of :math:`\|h_l - t_l\|^2 / (2N)`. The output layer learns by the network's own loss. The
    topmost decoder gets the softmax, here and while it learns. Decoders learn as in :class:`DTP`; under cross-entropy these
    are its targets for beta = 1.

    Call `learner.target(y)` with class indices (or class probabilities) before every forward pass, and
    `learner.feedback_step(x)` before every optimizer step. Give a factor on the loss in `target(y, scale=...)` as well. A
    scale below one puts the output's target at that fraction of the way from p to y.

    sigma: the standard deviation of the noise that the decoders learn from.
    activation: of the decoders. kernel, normalized: as in :class:`DTP`.

    Bartunov, Santoro, Richards, Marris, Hinton & Lillicrap, "Assessing the Scalability of Biologically-Motivated Deep
    Learning Algorithms and Architectures", NeurIPS 2018 (arXiv:1807.04587). A class says little about the activity below it, so
    the paper also adds auxiliary outputs to the network ("AO-SDTP"). They would change the model, and are not offered.
    Inferred: that the decoder gets the softmax, and the noise of the decoders, which is DTP's.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.rules.SDTP(), example=x)
        >>> learner.target(y)  # before every forward pass
        >>> nn.functional.cross_entropy(learner(x), y).backward()
        >>> learner.feedback_step(x)  # the decoders learn; before the optimizer steps
        >>> all(B.grad is not None for B in learner.feedback.parameters())
        True
    """

    name = "sdtp"
    label = "SDTP"
    paper = "Bartunov et al. 2018"
    needs = "target"

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        graph = self.ladder(sites, source, beta=1.0)
        if len(graph.edges[-1].source_shape) != 1:
            raise AttachError(
                f"{self.label} compares class probabilities, but the source {source.name!r} of shape {list(source.shape)} holds no "
                "class scores per sample or token: use DTP."
            )
        return graph

    def message(
        self, edge: Edge, d: Tensor, target: Tensor | None, activity: Tensor | None
    ) -> Tensor:
        assert activity is not None
        if target is None:  # a hidden source
            return pair(activity, len(d) * d)
        p = activity.softmax(1)
        return pair(
            p, target.sum(1, keepdim=True) * p - target
        )  # a label outside the classes sends nothing

    def feedback_step(self, phase: Phase) -> None:
        hidden = {edge.site.points for edge in phase.edges}
        reconstruct(
            phase,
            self.sigma,
            self.normalized,
            lambda edge, s: s if edge.source.points in hidden else s.softmax(1),
        )
