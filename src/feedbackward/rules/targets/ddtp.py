"""Direct difference target propagation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from feedbackward.activity import Site, Source
from feedbackward.errors import AttachError
from feedbackward.graph import Edge, Graph
from feedbackward.operators.decoder import Decoder, Decoding, RandomHiddenDecoder, pair
from feedbackward.rule import Rule
from feedbackward.rules.targets.decoding import decoder, descend, learning, refuse_noise, rows
from feedbackward.topologies import star

if TYPE_CHECKING:
    from feedbackward.engine.phase import Phase


@dataclass(frozen=True)
class DDTP(Rule):
    r"""Direct difference target propagation: learned decoders from the output straight to every site.

    .. math::
        t_L = a_L - \beta N e, \qquad t_l = h_l - (g_l(a_L) - g_l(t_L)), \qquad \delta h_l = (h_l - t_l) / (\beta N)

    This is the gradient of :math:`\|h_l - t_l\|^2 / (2 \beta N)`. A linear decoder sends :math:`e B_l`, as DKP does with another
    `B`.

    The decoders learn in `learner.feedback_step(x)` by the difference reconstruction loss, from noise at one site at a time:

    .. math::
        \tfrac{1}{N \sigma^2} \| g_l(F_l(h_l + \epsilon)) - g_l(a_L) - \epsilon \|^2
        + \tfrac{\lambda}{N \sigma^2} \| g_l(a_L + \epsilon') - g_l(a_L) \|^2, \qquad
        \epsilon, \epsilon' \sim \mathcal N(0, \sigma^2)

    :math:`F_l` is the network above site l. For small sigma it is least at :math:`\partial g_l / \partial a_L = J_l^\top (J_l
    J_l^\top + \lambda)^{-1}`, :math:`J_l = \partial a_L / \partial h_l`, and the targets are those of a damped Gauss-Newton step. A
    phase takes a forward pass for every site and one more. Call it before every optimizer step, or less often on large
    networks. Its loss has another scale than the network's, so give the feedback its own optimizer. The signals come out of
    an inverse, so use Adam for the network as well.

    beta: how far the target of the output goes along its error.
    sigma: the standard deviation of the noise.
    damping: :math:`\lambda`.
    activation: of the decoders: `"linear"`, `"tanh"`, `"relu"`.
    hidden: units of a fixed random tanh layer in each decoder, 0 for none (published as "RHL", with 2048).

    Meulemans, Carzaniga, Suykens, Sacramento & Grewe, "A Theoretical Framework for Target Propagation", NeurIPS 2020
    (arXiv:2006.14331). The authors' code shares the random hidden layer among all sites, and uses weight decay of the
    decoders in place of lambda. Its decoder with a learned hidden layer is not offered. Inferred: the initial values of the
    random layer, and that maps are decoded as vectors.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.rules.DDTP(), example=x)
        >>> nn.functional.cross_entropy(learner(x), y).backward()
        >>> learner.feedback_step(x)  # the decoders learn; before the optimizer steps
        >>> all(B.grad is not None for B in learner.feedback.parameters())
        True
    """

    beta: float = 0.16
    sigma: float = 0.08
    damping: float = 0.0
    activation: str = "linear"
    hidden: int = 0

    name = "ddtp"
    label = "DDTP"
    paper = "Meulemans et al. 2020"
    sends_activity = True
    in_phase = True
    linear = False
    unlocked = "backward"
    learned = True

    def __post_init__(self) -> None:
        refuse_noise(self.label, self.sigma)
        if self.damping < 0 or self.hidden < 0:
            raise AttachError(
                f"DDTP needs damping >= 0 and hidden >= 0, got {self.damping} and {self.hidden}."
            )

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        decoder: Decoding = Decoder(self.activation, self.beta)
        if self.hidden:
            decoder = RandomHiddenDecoder(self.activation, self.beta, self.hidden)
        return star(sites, source, decoder)

    def message(
        self, edge: Edge, d: Tensor, target: Tensor | None, activity: Tensor | None
    ) -> Tensor:
        assert activity is not None
        return pair(activity, self.beta * len(d) * d)

    def feedback_step(self, phase: Phase) -> None:
        with learning(phase):
            clean = phase.forward()
            for edge in phase.edges:
                noise = self.sigma * phase.noise(clean.sites[edge.site])
                moved = phase.forward(change=partial(_push, edge.site, noise))
                s, far = (rows(edge, taken.sources[edge.source.name]) for taken in (clean, moved))
                decode = decoder(phase, edge)
                loss = (decode(far) - decode(s) - rows(edge, noise)).square().sum()
                if self.damping:
                    near = s + self.sigma * phase.noise(s)
                    loss = loss + self.damping * (decode(near) - decode(s)).square().sum()
                descend(phase, edge, loss / (len(s) * self.sigma**2))


def _push(pushed: Site, noise: Tensor, site: Site, h: Tensor) -> Tensor:
    return h + noise if site == pushed else h
