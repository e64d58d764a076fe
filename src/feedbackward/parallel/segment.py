"""A stage as a module: its part of the model under its part of the feedback graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from feedbackward.activity import Source
from feedbackward.engine.cuts import Cuts
from feedbackward.engine.hooks import Tape
from feedbackward.engine.target import Target
from feedbackward.graph import Edge
from feedbackward.learner import Learner
from feedbackward.parallel.part import Part
from feedbackward.parallel.recording import Recording
from feedbackward.parallel.routes import Routes

# the gradient at a boundary that is not cut, among the messages of a backward pass
BOUNDARY = ""


@dataclass
class Root:
    """A tensor at which the backward of a stage begins.

    `message`: the name of the source whose error is its gradient, or BOUNDARY. Without one, the
    gradient is `fill` everywhere: 1 for a loss, 0 for a source whose error is not used.
    """

    tensor: Tensor
    message: str | None = None
    fill: float = 0.0


@dataclass
class Forward:
    """The forward pass of one micro-batch through a stage.

    `output`: what the next stage gets, detached; of the last stage the model's output.
    `sources`: the tensors of the sources that this stage holds, by name.
    """

    output: Any
    received: Tensor | None
    roots: list[Root] = field(default_factory=list)
    sources: Mapping[str, Tensor] = field(default_factory=dict)

    def backward_pairs(self, errors: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The tensors at which the backward begins, and their gradients."""
        tensors, grads = [], []
        for root in self.roots:
            tensors.append(root.tensor)
            if root.message is None:
                grads.append(torch.full_like(root.tensor, root.fill))
            else:
                grads.append(errors[root.message].to(root.tensor.dtype))
        return tensors, grads


class StageModule(nn.Module):
    """What one rank runs: its part of the model, with the cuts and feedback of that part."""

    def __init__(
        self,
        learner: Learner,
        recording: Recording,
        bounds: tuple[int | None, int | None],
        routes: Routes,
        stage: int,
    ) -> None:
        super().__init__()
        self.model, self.feedback = learner.model, learner.feedback
        self.needs_target = learner.attached.needs_target
        self.routes, self.stage = routes, stage
        inside = routes.inside(stage)
        self.cuts = Cuts(self.model, inside, self.feedback)
        self.places = {site: index for index, site in enumerate(inside.sites)}
        self._handles = self.cuts.install(self.model)
        sources = [s for s in routes.graph.sources if routes.source_stage[s.name] == stage]
        self.sends = [s for s in sources if routes.listeners(s)]
        cut = {site.points for site in routes.graph.sites}
        kept = [[s for s in self.sends if (s.points in cut) is also] for also in (False, True)]
        self.part = Part(self.model, recording, *bounds, *kept)
        self.from_above = routes.from_above(stage)
        self.local = routes.local_from_above(stage)
        self.kinds = recording.kinds
        self.error_dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    def forward(
        self, inputs: Any, rows: int, received: Tensor | None, target: Target | None
    ) -> Forward:
        """The forward pass of one micro-batch, ready for its backward."""
        if not torch.is_grad_enabled():
            return Forward(self.part.run(self.model, inputs, rows, received), received)
        self.cuts.recompute = True
        self.cuts.renew()
        with self.cuts.recording(target) as tape:
            output = self.part.run(self._call(), inputs, rows, received)
        output, roots = self._roots(tape, output, rows, target)
        return Forward(output, received, roots, self.part.sources)

    def _call(self) -> Callable[..., Any]:
        tied = self.cuts.tied()
        if not tied:
            return self.model
        return lambda *args, **kwargs: functional_call(self.model, tied, args, kwargs)

    def _roots(
        self, tape: Tape, output: Any, rows: int, target: Target | None
    ) -> tuple[Any, list[Root]]:
        roots = []
        for source, edges in self.from_above:
            tensor = self._broadcast(tape, source, edges, rows, target)
            if tensor is not None:
                sent = self.routes.sends_error(source)
                roots.append(Root(tensor, source.name if sent else None))
        for end in self.local:
            h = tape.h[self.places[end.site]]
            if h is not None and h.requires_grad and target is not None:
                roots.append(Root(self.cuts.local_loss(end, h, tape), fill=1.0))
        if self.part.upper is None:
            return output, roots
        if self.routes.uncut[self.stage] and output.requires_grad:
            roots.append(Root(output, BOUNDARY))
        return output.detach(), roots

    def _broadcast(
        self, tape: Tape, source: Source, edges: list[Edge], rows: int, target: Target | None
    ) -> Tensor | None:
        """Zeros in place of a source of a later stage, which send its error to the sites here."""
        found, activities = [], []
        blank = None
        for edge in edges:
            h = tape.h[self.places[edge.site]]
            if h is None:
                continue
            if blank is None:
                blank = h.new_zeros((rows, *source.shape), dtype=self.error_dtype)
            self.cuts.check(edge, h, tape.versions[self.places[edge.site]], blank)
            if h.requires_grad:
                found.append(edge)
                activities.append(h)
        if blank is None or not found:
            return None
        return self.cuts.broadcast(blank, found, activities, target)

    def remove(self) -> None:
        """Take the hooks away."""
        self.part.remove()
        for handle in self._handles:
            handle.remove()
