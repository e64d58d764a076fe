"""Difference target propagation."""

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
from feedbackward.topologies import as_source

if TYPE_CHECKING:
    from feedbackward.engine.phase import Phase


@dataclass(frozen=True)
class DTP(Laddered):
    r"""Difference target propagation: every site gets a target from the one above, through a learned decoder.

    .. math::
        t_K = h_K - \beta N\, \partial \mathrm{Loss} / \partial h_K, \qquad
        t_l = h_l - (g_l(h_{l+1}) - g_l(t_{l+1})), \qquad \delta h_l = (h_l - t_l) / (\beta N)

    The target of the last site K is set by the gradient, through the true weights of the output layer, as in the paper.
    :math:`\delta h_l` is the gradient of the local loss :math:`\|h_l - t_l\|^2 / (2 \beta N)` with the target fixed; so
    :math:`t_l = h_l - \beta N\, \delta h_l` at every site, and for small beta
    :math:`\delta h_l \to \delta h_{l+1}\, \partial g_l / \partial h_{l+1}`. N is the batch, times the tokens if these are kept.
    The published loss is :math:`\|h_l - t_l\|^2`, the same up to a factor :math:`2 \beta`. With exact inverses as decoders the
    targets are those of a Gauss-Newton step.

    The decoders :math:`g_l(s) = f(s B_l + b_l)`, `B_l: [n_{l+1}, n_l]`, learn in `learner.feedback_step(x)`, from noise at each site:

    .. math::
        \nabla\, \tfrac{1}{N \sigma^2} \| g_l(f_{l+1}(h_l + \epsilon)) - (h_l + \epsilon) \|^2, \qquad
        \epsilon \sim \mathcal N(0, \sigma^2)

    where :math:`f_{l+1}` is the segment above. Call it at least once before every optimizer step; without it the decoders stay
    random. The published training begins with some epochs of it. The curvature of this loss grows with the width of what a
    decoder reads (2e5 on the small CNN), so the gradient is divided by a bound of it: SGD is stable then at any rate below 2.
    Inverses make the signals larger than backprop's, so the network wants a lower rate, or Adam, as Meulemans et al. 2020 use.

    If a layer loses dimensions, a decoder that reconstructs its input is not the pseudo-inverse of the Jacobian, but biased
    towards the data (Meulemans et al. 2020). :class:`DDTP` does not have this bias.

    beta: how far the target that the gradient sets goes along it.
    top: `"gradient"`, as above; or `"decoder"`: the gradient sets the target of the output, :math:`t_L = a_L - \beta N e`, and a
        decoder from the output to the last site learns like the others. No weight is transported then, but the few
        outputs hardly determine the activity below them: such signals stayed at about 90 degrees to backprop's.
    decoders: `"learned"`; or `"fixed"` (FW-DTP): they stay random, and there is no phase to run. With linear decoders the
        signals are :math:`\delta h_l = \delta h_{l+1} B_l`: those of a chain of random matrices without the activations'
        derivatives, which the tanh of a decoder replaces by its own.
    sigma: the standard deviation of the noise.
    activation: of the decoders: `"linear"`, `"tanh"` (published, with tanh networks), `"relu"`.
    kernel: of the decoders from one map of two or three dimensions to another, which are convolutions, also where a flatten made
        it a vector. 0 makes them dense, which is affordable for a few small sites only.
    normalized: divide each decoder's gradient by the bound of its curvature. False is the loss as above, for Adam.
    With fixed decoders sigma and normalized mean nothing.

    Lee, Zhang, Fischer & Bengio, "Difference Target Propagation", ECML 2015 (arXiv:1412.7525); defaults and the noise's
    normalisation as in the code of Meulemans et al. 2020. Inferred: the form of the decoders of maps, and their normalisation.
    FW-DTP: Shibuya, Inoue, Kawakami & Sato, "Fixed-Weight Difference Target Propagation", AAAI 2023 (arXiv:2212.10352): in the
    authors' code `DTP(top="decoder", activation="tanh", decoders="fixed")`, with fully connected tanh layers and a searched
    size of `B`. Its batch norms within decoders, and in the sum that makes a target, are not offered.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.rules.DTP(), example=x)
        >>> nn.functional.cross_entropy(learner(x), y).backward()
        >>> learner.feedback_step(x)  # the decoders learn; before the optimizer steps
        >>> all(B.grad is not None for B in learner.feedback.parameters())
        True
    """

    beta: float = 0.16
    top: str = "gradient"
    decoders: str = "learned"

    name = "dtp"
    label = "DTP"
    paper = "Lee et al. 2015"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top not in ("gradient", "decoder"):
            raise AttachError(f"{self.label}: top is {self.top!r}, choose 'gradient' or 'decoder'.")
        if self.decoders not in ("learned", "fixed"):
            raise AttachError(
                f"{self.label}: decoders is {self.decoders!r}, choose 'learned' or 'fixed'."
            )

    @property
    def transport(self) -> bool | str:  # type: ignore[override]
        return "output layer" if self.top == "gradient" else False

    @property
    def learned(self) -> bool:  # type: ignore[override]
        return self.decoders == "learned"

    @property
    def in_phase(self) -> bool:  # type: ignore[override]
        return self.learned

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        if self.top == "decoder":
            return self.ladder(sites, source, self.beta)
        if len(sites) == 1:
            raise AttachError(
                f"{self.label} sets the target of the last site by the gradient, and {sites[0].name!r} is the only site, so this "
                "would be backprop: name a site below it as well, or choose top='decoder'."
            )
        return self.ladder(sites[:-1], as_source(sites[-1]), self.beta)

    def message(
        self, edge: Edge, d: Tensor, target: Tensor | None, activity: Tensor | None
    ) -> Tensor:
        assert activity is not None
        return pair(activity, self.beta * len(d) * d)

    def feedback_step(self, phase: Phase) -> None:
        reconstruct(phase, self.sigma, self.normalized)
