"""Error-driven input modulation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from feedbackward.activity import ModelInput, PreActivation, Site, Source
from feedbackward.graph import Edge, Graph
from feedbackward.operators import Dense, Operator
from feedbackward.rule import Rule, refuse_zeros
from feedbackward.rules.targets.decoding import learning, rows

if TYPE_CHECKING:
    from feedbackward.engine.phase import Phase


@dataclass(frozen=True)
class PEPITA(Rule):
    r"""PEPITA: the output's error is added to the input, and layers learn from how their activities move in a second pass.

    .. math::
        x' = x + \epsilon F, \qquad \epsilon = N\, \partial \mathrm{Loss} / \partial a_L, \qquad
        \nabla W_l = \tfrac1{N P_l} (h_l - h_l')^\top h_{l-1}', \qquad F: [C, d]\ \text{fixed}

    A prime marks the second pass; :math:`P_l` is the number of positions of a map, over which the update of a convolution is
    averaged, and 1 otherwise. No signal goes down through a layer, and no derivative of an activation is used. Sites are the
    inputs :math:`a_l` of the activation modules. What else lies between two of them (a batch norm) learns with the layer,
    from the gradient that autograd makes of :math:`\delta a_l = (h_l - h_l') / (N P_l)`. What lies above the last site
    learns by its own gradient, in the first pass.

    Call `learner.feedback_step(x, loss_fn)` after the backward pass of every batch, before the optimizer steps: it runs the
    second pass, and nothing below the last site learns without it. Batch norms in it use its own statistics; dropout masks
    are those of a first pass that it repeats.

    The net needs one floating-point input, such as images, to which an error can be added, and its activations as modules.
    It served nets of up to three hidden layers in the paper; with depth, what :math:`x'` says of the error is lost. The range
    of rates that suit it is narrow. In short runs here (small nets, 3,500 images) it was not above :class:`Frozen` at the best rate
    of each, and a small convolutional net diverged.

    operator: the form of F and its initial values, which are those of the authors' code.

    Dellaferrera & Kreiman, "Error-driven Input Modulation: Solving the Credit Assignment Problem without a Backward Pass",
    ICML 2022 (arXiv:2201.11665). The authors' code has no biases, softmax outputs with their error, SGD with momentum at
    0.01, and 10 % dropout; its output layer learns from the second pass where there are two fully connected layers, else
    from the error of the first and the activity of the second.

    Hidden layers get their gradients in the second pass alone: `DistributedDataParallel` needs `find_unused_parameters=True`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import torch.nn.functional as F
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.rules.PEPITA(), example=x)
        >>> loss = lambda output: F.cross_entropy(output, y)
        >>> loss(learner(x)).backward()
        >>> learner.feedback_step(x, loss)  # the second pass
        >>> all(p.grad is not None for p in model.parameters())
        True
    """

    operator: Operator = Dense(scale=0.05)

    name = "pepita"
    label = "PEPITA"
    paper = "Dellaferrera & Kreiman 2022"
    feeds = ModelInput
    unlocked = "backward"
    linear = False
    in_phase = True
    revises = True

    def __post_init__(self) -> None:
        refuse_zeros(self.label, self.operator)

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        into = next(site for site in sites if isinstance(site, ModelInput))
        return Graph(tuple(sites), (Edge(source, into, self.operator),))

    def feedback_step(self, phase: Phase) -> None:
        (edge,) = phase.edges
        with learning(phase):
            before, shift = _first(phase, edge)
            after: dict[Site, Tensor] = {}

            def moved(site: Site, a: Tensor) -> Tensor:
                if site == edge.site:
                    return a + shift.reshape(a.shape).to(a.dtype)
                after[site] = a
                # an activation may work in place
                return a.detach().clone()

            phase.forward(moved, gradients=True)
            ends = {site: a for site, a in after.items() if a.requires_grad}
            signals = [_signal(site, before[site], a.detach()) for site, a in ends.items()]
            own = phase.trainable()
            made = torch.autograd.grad(
                list(ends.values()), list(own.values()), signals, allow_unused=True
            )
        phase.revise({k: g for k, g in zip(own, made, strict=True) if g is not None})


def _first(phase: Phase, edge: Edge) -> tuple[dict[Site, Tensor], Tensor]:
    """What enters the activations in the first pass, and what the error adds to the input, `[M, *input]`."""
    before: dict[Site, Tensor] = {}

    def keep(site: Site, a: Tensor) -> Tensor:
        before.setdefault(site, a.detach().clone())
        return a.detach().requires_grad_().clone()

    made = phase.forward(keep, gradients=True)
    (d,) = torch.autograd.grad(phase.loss(made.output), list(made.sources.values()))
    error = rows(edge, d)
    weights = tuple(w.to(error.dtype) for w in phase.weights(edge))
    return before, edge.operator.send(weights, len(error) * error, edge.site_shape)


def _signal(site: Site, before: Tensor, after: Tensor) -> Tensor:
    """delta a of a site, of its values in the two passes."""
    assert isinstance(site, PreActivation)
    places = math.prod(site.map[1:]) if site.map else math.prod(site.shape[: site.tokens])
    difference = site.activation(before.clone()) - site.activation(after.clone())
    return difference / (len(before) * places)
