"""Recursive local representation alignment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from feedbackward.activity import Site, Source
from feedbackward.errors import AttachError
from feedbackward.graph import Edge, Graph
from feedbackward.operators import Dense, Operator, Weights
from feedbackward.operators.base import widened
from feedbackward.rule import Rule
from feedbackward.topologies import star

# (f(a) - f(a - d)) / f'(a), from h = f(a): what f' makes of it is LRA's difference of activations
_CHANGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda h, d: d,
    "relu": lambda h, d: torch.where(h > 0, torch.minimum(d, h), d),
    "tanh": lambda h, d: (u := torch.tanh(d)) / (1 - h * u).clamp_min(1e-6),
}


@dataclass(frozen=True)
class RecLRA(Rule):
    r"""rec-LRA: error synapses from the output straight to the ends of blocks, each of which moves towards a target.

    .. math::
        d_b = \beta\, e E_b, \qquad t_b = f(a_b - d_b), \qquad e_b = f(a_b) - t_b, \qquad \nabla E_b = \tfrac1N e^\top h_b

    for a site :math:`h_b = f(a_b)` and the error e of each sample. Inside a block the error :math:`e_b` goes on by exact
    derivatives. Use it with `sites="blocks"`. The gradient of `E: [C, n_b]` is DKP's outer product, so with a linear f the rule
    is DKP with `beta` times its signal.

    beta: how far a target goes.
    activation: f, the function that the sites end with: `"relu"`, `"tanh"` or `"linear"`. With `"relu"` the
        target of a unit that is on stays above zero.
    operator: the form of `E` and how it starts; one that can be learned.

    Ororbia, Mali, Kifer & Giles, "Backpropagation-Free Deep Learning with Recursive Local Representation Alignment", AAAI
    2023 (arXiv:2002.03911). Inferred from the abstract and the equations of LRA-E (:class:`LRA`), for the
    paper's body was not at hand: the learning of `E`, and the derivatives within a block, where the paper generates targets
    for the layers inside as well. Its second version's convolutions of fixed noise maps are not offered.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.rules.RecLRA(), example=x)
        >>> nn.functional.cross_entropy(learner(x), y).backward()
        >>> [tuple(B.grad.shape) for B in learner.feedback.parameters()]
        [(3, 8)]
    """

    beta: float = 1.0
    activation: str = "relu"
    operator: Operator = Dense()

    name = "rec_lra"
    label = "rec-LRA"
    paper = "Ororbia et al. 2023"
    receives = True
    linear = False
    unlocked = "backward"
    learned = True

    def __post_init__(self) -> None:
        if self.activation not in _CHANGES:
            raise AttachError(
                f"unknown activation {self.activation!r} of rec-LRA's sites: choose one of {', '.join(_CHANGES)}."
            )
        if not self.beta > 0:
            raise AttachError(f"rec-LRA's targets need a beta above 0, got {self.beta}.")

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        return star(sites, source, self.operator)

    def receive(self, edge: Edge, sent: Tensor, h: Tensor) -> Tensor:
        h, d = (widened(t) for t in (h, sent))
        n = len(d)  # the error of a mean loss carries 1/N
        return _CHANGES[self.activation](h, self.beta * n * d) / n

    def feedback_grad(self, edge: Edge, weights: Weights, d: Tensor, h: Tensor) -> Weights:
        return edge.operator.correlate(weights, d, h, center=False)
