"""The cuts of a model, and the broadcast of errors to them.

At a cut, the tape keeps the activity `h`, still attached to the segment that made it. The rest of the network gets
`h.detach()`. At a source stands a `Broadcast`, which takes the kept activities as inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from feedbackward.activity import Site, Source
from feedbackward.engine.autograd import Broadcast, Defer, Join, Share, Sweep
from feedbackward.engine.checkpoints import KNOWN, kept_by_checkpoints
from feedbackward.engine.fit import check_fit, check_met, check_rows
from feedbackward.engine.hooks import Hooked, PassOverError, SegmentVisitor, Tape
from feedbackward.engine.target import Target
from feedbackward.engine.upward import Upward
from feedbackward.engine.weights import weight_named, weights_of
from feedbackward.errors import SiteError
from feedbackward.graph import Edge, Graph, Local


class Cuts(Hooked):
    """The cuts and broadcasts of one graph."""

    def __init__(self, model: nn.Module, graph: Graph, feedback: nn.Module) -> None:
        super().__init__(graph.sites, graph.sources, graph.branches)
        self.model, self.feedback, self.edges = model, feedback, graph.edges
        place = {site: i for i, site in enumerate(graph.sites)}
        self.routes = [
            [(place[e.site], e) for e in graph.edges if e.source == source]
            for source in graph.sources
        ]
        self.edges_to = [[e for e in graph.edges if e.site == site] for site in graph.sites]
        self.local = {place[end.site]: end for end in graph.local}
        self._read = {place[end.reads] for end in graph.local if end.reads is not None}
        self._every = [site.every for site in graph.sites]
        self._in_time = any(self._every)
        # by edge, the shapes and types of the site and the source that were found to fit
        self._fitting: dict[int, tuple[object, ...]] = {}
        self.upward = Upward(graph)
        self._sites_by_points = {site.points: place[site] for site in graph.sites}
        # whether the latest forward pass was cut: a checkpoint may repeat a part of it
        self.recompute = False
        # by source at which the latest pass did no more than send its error, whether what went on required gradients
        self._onward: dict[int, bool] = {}
        self._one_way = KNOWN and not graph.upward and not graph.branches

    def on_site(self, index: int, h: Tensor) -> Tensor:
        """Keep `h` and return it detached; a second consumer of the same tensor gets the same detached one."""
        tape = self.tape
        if tape is None:
            return h.detach() if self._repeated() else h
        cut, site = tape.cut[index], self.sites[index]
        if self._every[index]:
            return self._on_call(index, h, tape)
        if tape.seen[index] == len(site.points) or (cut is not None and tape.h[index] is not h):
            raise SiteError(
                f"site {site.name!r} got a second tensor in one forward pass: the model does not run as it did "
                "on the example. Attach again with an example of this form, or name other sites."
            )
        tape.seen[index] += 1
        if cut is None:
            cut = h.detach()
            # signals that go up are derivatives with respect to the cut
            if index in self.upward and torch.is_grad_enabled():
                cut.requires_grad_()
            tape.order.append(index)
            tape.h[index], tape.cut[index], tape.versions[index] = h, cut, h._version
            if index in self._read:
                tape.read[index] = cut, cut._version
            if tape.visitor is not None:
                self.flush()
                tape.pending = (index, h, h._version)
        kept = tape.visitor is None and torch.is_grad_enabled()
        if not kept and tape.seen[index] == len(site.points):
            tape.h[index] = tape.cut[index] = None
        if index == tape.hold and not torch.is_grad_enabled():
            tape.held = h.detach()
            torch.set_grad_enabled(True)
        return cut

    def _on_call(self, index: int, h: Tensor, tape: Tape) -> Tensor:
        """One call of a module whose calls are one site: nothing of it stays attached to the calls before."""
        if tape.h[index] is not None:
            raise SiteError(
                f"module {self.sites[index].name!r} is called again after the tensor whose error is sent, so this call would get "
                "no error. Choose a later error_at, or name another site."
            )
        if not tape.seen[index]:
            tape.order.append(index)
        tape.seen[index] += 1
        tape.steps[index].append((h, h._version))
        return h.detach()

    def on_beside(self, tensor: Tensor) -> Tensor:
        """Detached: a state that goes round the cut of a cell (an LSTM's memory) would carry gradients through time."""
        if self.tape is None and not self._repeated():
            return tensor
        return tensor.detach()

    def _stack(self, tape: Tape) -> None:
        """Make one activity `[N, calls, ...]` of the calls of each site of every call."""
        if not self._in_time:
            return
        for index, steps in enumerate(tape.steps):
            if not steps or tape.h[index] is not None:
                continue
            for h, version in steps:
                check_met(self.sites[index], h, version)
            shapes = {tuple(h.shape) for h, _ in steps}
            if len(shapes) > 1:
                raise SiteError(
                    f"the calls of module {self.sites[index].name!r} returned tensors of shapes {sorted(shapes)}, which are "
                    "no steps of one activity. Pad the sequences to one batch, or name modules that are called once."
                )
            h = torch.stack([h for h, _ in steps], 1)
            tape.h[index], tape.versions[index] = h, h._version

    def local_loss(self, end: Local, h: Tensor, tape: Tape) -> Tensor:
        """The loss of a site's auxiliary network, times the target's scale. The pass must have a target."""
        assert tape.target is not None
        given = [h] if end.reads is None else [h, self._read_of(end.reads, tape)]
        network = self.feedback.get_submodule(end.key)
        own = next((p for p in network.parameters() if p.is_floating_point()), h)
        if not torch.is_autocast_enabled(h.device.type):
            # a part of the model may compute in another precision than its first parameter has
            given = [t.to(own.dtype) for t in given]
        return end.loss(network(*given), tape.target.raw) * tape.target.scale

    def _read_of(self, site: Site, tape: Tape) -> Tensor:
        h, version = tape.read.get(self._sites_by_points[site.points], (None, 0))
        check_met(site, h, version)
        assert h is not None
        return h

    def _local_losses(self, source: Source, tensor: Tensor, tape: Tape) -> list[Tensor]:
        """The losses of the sites that start with this source: a checkpoint round a site must not repeat them."""
        losses = []
        for place, end in self.local.items():
            h = tape.h[place]
            below_held = h is None and tape.hold is not None and tape.seen[place]
            if end.source != source or below_held:
                continue
            check_met(end.site, h, tape.versions[place])
            assert h is not None
            check_rows(end.site, h.shape[:1], source, tensor.shape[:1])
            if h.requires_grad and tape.target is not None:
                losses.append(self.local_loss(end, h, tape))
        return losses

    def site_of(self, source: Source) -> int | None:
        """The number of the site that is the same tensor as the source, if there is one."""
        return self._sites_by_points.get(source.points)

    @contextmanager
    def visiting(self, visitor: SegmentVisitor, target: Target | None = None) -> Iterator[Tape]:
        """Run a forward pass in which the visitor handles each site when the next module begins.

        By then the calling code no longer holds the tensors in between, which would otherwise stay alive through the
        segment's backward pass.
        """
        handles = [
            m.register_forward_pre_hook(self.flush, prepend=True) for m in self.model.modules()
        ]
        try:
            with self.recording(target, visitor) as tape:
                try:
                    yield tape
                    self.flush()
                except PassOverError:
                    tape.over = True
        finally:
            for handle in handles:
                handle.remove()

    def flush(self, *call: Any) -> None:
        """Let the visitor handle the site that is pending."""
        if (
            self.tape is not None
            and self.tape.pending is not None
            and self.tape.visitor is not None
        ):
            pending, self.tape.pending = self.tape.pending, None
            self.tape.visitor.at_site(*pending)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Take the tape away while a segment's backward pass runs inside a forward pass.

        A checkpoint in the segment then repeats modules without writing to the tape.
        """
        tape, recompute = self.tape, self.recompute
        self.tape, self.recompute = None, True
        try:
            yield
        finally:
            self.tape, self.recompute = tape, recompute

    def broadcast(
        self,
        source: Tensor,
        edges: Sequence[Edge],
        activities: Sequence[Tensor],
        target: Target | None,
        learn: bool = True,
    ) -> Tensor:
        """The source, whose error gives the activities their signals and, with `learn`, the feedback its gradients."""
        weights: list[Tensor] = []
        for edge in edges:
            own = weights_of(self.feedback, edge)
            if edge.operator.renewed:
                # the next pass changes them, perhaps before the backward pass of this one
                own = tuple(B.clone() for B in own)
            elif edge.operator.common:
                # several edges use the same tensors, and a compiler takes no tensor twice
                own = tuple(B.view_as(B) for B in own)
            learned = learn and edge.learns_in_pass
            weights += own if learned else [B.detach() for B in own]
            if edge.forward_weight:
                weights.append(weight_named(self.model, edge.forward_weight).detach())
        sent = None
        if (
            target is not None
            and any(edge.rule.needs == "target" for edge in edges)
            and self.site_of(edges[0].source) is None
        ):
            sent = target.one_hot(source, edges[0].source.tokens)
        with kept_by_checkpoints():
            return Broadcast.apply(source, edges, sent, *activities, *weights)

    def renew(self) -> None:
        """At the beginning of a pass, change the weights of the edges whose operator is `renewed`."""
        for edge in self.edges:
            if edge.operator.renewed:
                with torch.no_grad():
                    edge.operator.renew(weights_of(self.feedback, edge))

    def tied(self) -> dict[str, Tensor]:
        """Substitutes for the weights of the model whose gradients are shared with feedback weights, by name."""
        shared = [(e, e.shares, weight_named(self.model, e.shares)) for e in self.edges if e.shares]
        return {
            name: Share.apply(W, edge.operator, *weights_of(self.feedback, edge))
            for edge, name, W in shared
            if W.requires_grad
        }

    def on_source(self, index: int, tensor: Tensor) -> Tensor:
        """Put the broadcast of this source's error in place. The pass must have reached every site that it feeds."""
        tape = self.tape
        if tape is None:
            if not self._repeated():
                return tensor
            if index not in self._onward:
                raise SiteError(
                    f"a checkpoint repeats the module whose output's error is broadcast, {self.sources[index].name!r}, and what this "
                    "rule or schedule does there cannot be repeated. Checkpoint the parts below it, or choose another error_at."
                )
            if tensor.requires_grad == self._onward[index]:
                return tensor
            again = tensor.detach().requires_grad_(self._onward[index])
            # an in-place operation may follow
            return again.clone()
        if self.sources[index].name in tape.sources:
            raise SiteError(
                f"the source {self.sources[index].name!r} was reached twice in one forward pass, so its sites would be "
                "fed twice. Attach again with an example of the form that is used in training."
            )
        source = self.sources[index]
        tape.order.append(source.name)
        self._onward.pop(index, None)
        if tape.visitor is not None:
            self.flush()
            tape.sources[source.name] = None
            return tape.visitor.at_source(source, tensor)
        tape.sources[source.name] = tensor
        self._stack(tape)
        losses = self._local_losses(source, tensor, tape)
        if losses:
            tensor = Join.apply(tensor, *losses)
        edges, activities = [], []
        for place, edge in self.routes[index]:
            h = tape.h[place]
            if h is None and tape.hold is not None and tape.seen[place]:
                # the site lies below the part that trains in this pass
                continue
            self.check(edge, h, tape.versions[place], tensor)
            # a segment with nothing to train gets no signal, unless it passes the signal on
            if h is not None and (h.requires_grad or place in self.upward):
                edges.append(edge)
                activities.append(self.upward.hang(place, tape, check_met))
        if edges:
            tensor = self.broadcast(tensor, edges, activities, tape.target)
        if self._one_way and tape.hold is None and not losses:
            self._onward[index] = tensor.requires_grad
        return tensor if tape.hold is None else self._watched(tensor, source, tape)

    def on_branch(self, index: int, h: Tensor) -> Tensor:
        """Let the branch hand on what arrived at its input one sweep before."""
        tape = self.tape
        if tape is None or not h.requires_grad:
            return h
        held: list[Tensor] = []
        tape.deferred.append((h, held))
        return Defer.apply(h, held)

    def on_swept(self, index: int, tensor: Tensor) -> Tensor:
        """Let the error of this source be swept down to the branches before gradients are computed."""
        tape = self.tape
        if tape is None or self.branches is None or not tape.deferred:
            return tensor
        return Sweep.apply(tensor, self.branches.sweeps, tuple(tape.deferred))

    def _watched(self, tensor: Tensor, source: Source, tape: Tape) -> Tensor:
        """The source, with a hook that records its error in the backward pass."""
        if not tensor.requires_grad:
            tensor = tensor.detach().requires_grad_().clone()
        tensor.register_hook(lambda d: tape.errors.__setitem__(source.name, d))
        return tensor

    def _repeated(self) -> bool:
        """Whether a checkpoint is repeating, in the backward pass, a part of a forward pass that was cut."""
        # a compiler repeats what it has recorded
        if not self.recompute or torch.compiler.is_compiling():
            return False
        if torch._C._current_graph_task_id() != -1:
            return True
        # this is a plain pass of the model, whose checkpoints are plain as well
        self.recompute = not torch.is_grad_enabled()
        return False

    def check(self, edge: Edge, h: Tensor | None, version: int, source: Tensor) -> None:
        """Refuse an edge whose site was not reached, was changed in place, or does not fit its source."""
        check_met(edge.site, h, version)
        assert h is not None
        if torch.compiler.is_compiling():
            check_fit(edge, h, source)
            return
        kinds = (h.shape, h.dtype, source.shape, source.dtype)
        if self._fitting.get(id(edge)) != kinds:
            check_fit(edge, h, source)
            self._fitting[id(edge)] = kinds
