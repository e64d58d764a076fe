"""What a rule sees in a phase of its own: the edges, their weights, and passes of the model with changed activities."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .graph import Edge, Site
from .operators.base import Weights
from .seams import Observer
from .trace import preserved, run

if TYPE_CHECKING:
    from .learner import Learner


@dataclass(frozen=True)
class Pass:
    """The activities of one plain forward pass, by site, as the layers below made them; and the sources, by name."""

    sites: Mapping[Site, Tensor]
    sources: Mapping[str, Tensor]
    output: Any


class Phase:
    """One call of `learner.feedback_step(inputs)`. Nothing of the model changes in it.

    Attributes:
        edges: the feedback graph's edges.
        inputs: as the user gave them.
    """

    def __init__(self, learner: Learner, inputs: Any) -> None:
        self._learner, self.inputs = learner, inputs
        self.edges = learner.graph.edges
        self._sites, self._sources = learner.graph.sites, learner.graph.sources

    def part(self, edges: Sequence[Edge]) -> Phase:
        """The phase of some edges: its passes meet their sites and sources only."""
        phase = Phase(self._learner, self.inputs)
        phase.edges = tuple(edges)
        phase._sites = tuple(dict.fromkeys(edge.site for edge in edges))
        phase._sources = tuple(dict.fromkeys(edge.source for edge in edges))
        return phase

    def weights(self, edge: Edge) -> Weights:
        """The edge's feedback weights, Parameters where they are learned."""
        return self._learner.weights_of(edge)

    def weight(self, name: str) -> Tensor:
        """A weight of the model (an arc's own: `arc.weight`), detached."""
        return self._learner.model.get_parameter(name).detach()

    def forward(
        self, change: Callable[[Site, Tensor], Tensor] | None = None, gradients: bool = False
    ) -> Pass:
        """A plain forward pass on the inputs, without cuts, in the model's current mode.

        `change(site, h)` gives what the layers above a site get in place of its activity. Buffers and random state are
        restored afterwards. With `gradients` autograd records the pass.
        """
        learner = self._learner
        observer = Observer(self._sites, self._sources, change)
        with ExitStack() as stack:
            stack.enter_context(preserved(learner.model))
            stack.enter_context(torch.set_grad_enabled(gradients))
            for handle in observer.install(learner.model, prepend=True):
                stack.callback(handle.remove)
            tape = stack.enter_context(observer.recording())
            output = run(learner.model, self.inputs)
        activities = {site: h for site, h in zip(observer.sites, tape.h, strict=True) if h is not None}
        return Pass(activities, {k: v for k, v in tape.sources.items() if v is not None}, output)

    def give(self, edge: Edge, grads: Weights) -> None:
        """Add to the gradients of the edge's learnable weights, in their order."""
        for weight, grad in zip(self.weights(edge), grads, strict=False):
            grad = grad.detach().to(weight.dtype)
            weight.grad = grad if weight.grad is None else weight.grad + grad
