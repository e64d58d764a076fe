"""The seams of a model: cuts, the broadcast of errors, and observation. The only file with hooks and autograd functions.

At a cut the activity `h`, still attached to the segment that made it, is kept on the tape, and the rest of the
network gets `h.detach()`. At a source, `Broadcast` returns the tensor unchanged and takes the kept activities as
further inputs, so that autograd itself hands each its teaching signal and each feedback weight its gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.hooks import RemovableHandle

from .errors import SiteError
from .feedback import weights_of
from .graph import Edge, Graph, Local, Site, Source, Tap
from .operators.base import Operator
from .rules.base import Rule
from .target import Target


class Broadcast(torch.autograd.Function):
    """Identity on a source; its backward sends the source's error along the edges.

    forward(source, rule, edges, target, h_1..h_k, *weights of edge 1, ..., *weights of edge k) -> source. Backward, with
    `d = dLoss/dsource`: `d` for the source, the teaching signal shaped like `h_i` for each activity, and the rule's
    gradient for each learned weight.
    """

    @staticmethod
    def forward(
        ctx: Any, source: Tensor, rule: Rule, edges: Sequence[Edge], target: Tensor | None, *tensors: Tensor
    ) -> Tensor:
        k = len(edges)
        ctx.rule, ctx.edges = rule, edges
        ctx.kinds = [(h.shape, h.dtype) for h in tensors[:k]]
        ctx.kept = rule.receives or any(rule.learns_in_pass(edge) for edge in edges)
        activity = source if rule.sends_activity else None
        ctx.save_for_backward(target, activity, *(tensors if ctx.kept else tensors[k:]))
        return source.detach()  # not a view: an in-place operation may follow

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        target, activity, *saved = ctx.saved_tensors
        k = len(ctx.edges)
        activities, rest = (saved[:k], saved[k:]) if ctx.kept else ([], saved)
        signals: list[Tensor | None] = []
        grads: list[Tensor | None] = []
        for i, (edge, (shape, dtype)) in enumerate(zip(ctx.edges, ctx.kinds, strict=True)):
            lead, parts = edge.leading, len(edge.operator.parts) + bool(edge.borrows)
            weights, rest = tuple(rest[:parts]), rest[parts:]
            error, y, s = (
                None if t is None else t.to(dtype).flatten(0, lead - 1) for t in (d, target, activity)
            )
            message = ctx.rule.message(edge, error, y, s)
            signal = None
            if ctx.needs_input_grad[4 + i]:
                cast = tuple(w.to(dtype) if w.is_floating_point() else w for w in weights)
                signal = edge.operator.send(cast, message, tuple(shape[lead:]))
                if ctx.rule.receives:
                    h = activities[i].flatten(0, lead - 1)
                    signal = ctx.rule.receive(edge, signal.reshape(h.shape), h)
                signal = signal.reshape(shape)
            signals.append(signal)
            wanted = ctx.needs_input_grad[4 + k + len(grads) : 4 + k + len(grads) + parts]
            made: Sequence[Tensor] = ()
            if any(wanted):
                made = ctx.rule.feedback_grad(edge, weights, message, activities[i].flatten(0, lead - 1))
            grads += [
                made[j].to(w.dtype) if need else None
                for j, (w, need) in enumerate(zip(weights, wanted, strict=True))
            ]
        return (d, None, None, None, *signals, *grads)


class Join(torch.autograd.Function):
    """Identity on a source whose backward also starts that of the local losses: forward(source, loss_1..loss_k)."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, *losses: Tensor) -> Tensor:
        ctx.kinds = [(loss.shape, loss.dtype, loss.device) for loss in losses]
        return source.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, ...]:
        return (d, *(torch.ones(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.kinds))


class Share(torch.autograd.Function):
    """`W` as it is; its backward gives `W` its gradient, and `B` what the operator makes of it: it is computed once."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, operator: Operator, *weights: Tensor) -> Tensor:
        ctx.operator = operator
        ctx.save_for_backward(*weights)
        return W.view_as(W)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights = ctx.saved_tensors
        made = ctx.operator.share(weights, grad)
        return (grad, None, *made, *[None] * (len(weights) - len(made)))


class Sweep(Protocol):
    """A schedule that runs the backward of a segment within the forward pass."""

    def met(self, index: int, h: Tensor, version: int) -> None:
        """Run the backward of the segment that ends with `h`, the activity of site `index`; nothing of it is kept.
        `version` is the one that `h` had when it was met."""

    def fired(self, source: Source, tensor: Tensor) -> Tensor:
        """What the rest of the network gets in place of the source."""


class PassOverError(BaseException):
    """A sweep has all that it wanted: the rest of the forward pass is left out. Not for a model's own handlers."""


class Tape:
    """What one forward pass has met so far.

    `target`: what `learner.target` was given. `sweep`: None for a joint pass. `hold`: the number of the site from which on
    a pass that began without gradients records them; `errors` then gets the errors of the sources in the backward pass.
    """

    def __init__(
        self, sites: int, target: Target | None = None, sweep: Sweep | None = None, hold: int | None = None
    ) -> None:
        self.h: list[Tensor | None] = [None] * sites  # attached activities
        self.cut: list[Tensor | None] = [None] * sites  # what the rest of the network got instead
        self.versions = [0] * sites
        self.seen = [0] * sites  # how many of a site's taps have met it
        self.calls: dict[str, int] = {}
        self.sources: dict[str, Tensor | None] = {}
        self.losses: dict[str, list[Tensor]] = {}  # local ones, by their source's name
        self.target, self.sweep, self.hold = target, sweep, hold
        self.errors: dict[str, Tensor] = {}
        self.order: list[int | str] = []  # sites by number and sources by name, as they were first met
        self.held: Tensor | None = None  # the activity of the site `hold`
        self.over = False  # whether the sweep ended the pass
        self.pending: tuple[int, Tensor, int] | None = None  # what the sweep has yet to be told


class _Hooked(ABC):
    """Hooks at sites and sources. Inert unless a tape is in place."""

    def __init__(self, sites: tuple[Site, ...], sources: tuple[Source, ...]) -> None:
        self.sites, self.sources = sites, sources
        self.tape: Tape | None = None

    @abstractmethod
    def meet(self, index: int, h: Tensor) -> Tensor:
        """What the rest of the network gets in place of the activity of site `index`."""

    @abstractmethod
    def fire(self, index: int, tensor: Tensor) -> Tensor:
        """What the rest of the network gets in place of source `index`."""

    def install(self, model: nn.Module, prepend: bool = False) -> list[RemovableHandle]:
        """Register the hooks; where a tensor is both source and site, the broadcast comes before the cut."""
        handles = []
        inputs: dict[str, dict[int, int]] = {}
        kinds = (("fire", self.sources), ("meet", self.sites))
        for kind, activities in (
            reversed(kinds) if prepend else kinds
        ):  # of what is prepended the last comes first
            for index, activity in enumerate(activities):
                for tap in activity.taps:
                    if tap.kind == "input":
                        inputs.setdefault(tap.module, {})[tap.call] = index
                    else:
                        hook = _OutputHook(self, kind, index, tap)
                        handles.append(
                            model.get_submodule(tap.module).register_forward_hook(hook, prepend=prepend)
                        )
        for name, calls in inputs.items():
            pre = _InputHook(self, name, calls)
            handles.append(
                model.get_submodule(name).register_forward_pre_hook(pre, with_kwargs=True, prepend=prepend)
            )
        return handles

    @contextmanager
    def recording(
        self, target: Target | None = None, sweep: Sweep | None = None, hold: int | None = None
    ) -> Iterator[Tape]:
        """One tape per forward pass, dropped at its end. A pass that missed a site or source is refused."""
        if self.tape is not None:
            raise SiteError(
                "a forward pass of this learner runs already (in another thread?): use one learner per thread."
            )
        self.tape = Tape(len(self.sites), target, sweep, hold)
        try:
            yield self.tape
            if not self.tape.over:
                self._complete(self.tape)
        finally:
            self.tape = None

    def _complete(self, tape: Tape) -> None:
        missed = [site.name for site, seen in zip(self.sites, tape.seen, strict=True) if not seen]
        missed += [source.name for source in self.sources if source.name not in tape.sources]
        if missed:
            raise SiteError(
                f"{missed[0]!r} was not reached in this forward pass, so layers below it would not be trained. The model "
                "must run the same modules in every training pass; name other sites, or run it under `learner.exact()`."
            )


class Observer(_Hooked):
    """Records the activities of sites and sources; the true gradients flow. `change` may replace activities."""

    def __init__(
        self,
        sites: tuple[Site, ...],
        sources: tuple[Source, ...],
        change: Callable[[Site, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(sites, sources)
        self.change = change

    def meet(self, index: int, h: Tensor) -> Tensor:
        if self.tape is not None:
            self.tape.h[index] = h
            self.tape.seen[index] += 1
            if self.change is not None:
                return self.change(self.sites[index], h)
        return h

    def fire(self, index: int, tensor: Tensor) -> Tensor:
        if self.tape is not None:
            self.tape.sources[self.sources[index].name] = tensor
        return tensor.clone()  # an in-place operation that follows must not change the tensor that was kept


class Director(_Hooked):
    """Asks two functions what the rest of the network gets at a site and at a source."""

    def __init__(self, sites: tuple[Site, ...], sources: tuple[Source, ...]) -> None:
        super().__init__(sites, sources)
        self.met: Callable[[int, Tensor], Tensor] = lambda index, h: h
        self.fired: Callable[[Source, Tensor], Tensor] = lambda source, tensor: tensor

    @contextmanager
    def directing(
        self,
        met: Callable[[int, Tensor], Tensor],
        fired: Callable[[Source, Tensor], Tensor],
        whole: bool = True,
    ) -> Iterator[None]:
        """A pass under these functions; unless `whole`, one that may leave sites out. `PassOverError` ends it."""
        self.met, self.fired = met, fired
        with self.recording() as tape:
            tape.over = not whole
            try:
                yield
            except PassOverError:
                tape.over = True

    def meet(self, index: int, h: Tensor) -> Tensor:
        tape = self.tape
        if tape is None:  # a checkpoint that repeats a module in the backward pass
            return h.detach() if torch._C._current_graph_task_id() != -1 else h
        tape.seen[index] += 1
        if tape.cut[index] is None or tape.h[index] is not h:
            tape.h[index], tape.cut[index] = h, self.met(index, h)
        return tape.cut[index]  # type: ignore[return-value]

    def fire(self, index: int, tensor: Tensor) -> Tensor:
        if self.tape is None:
            return tensor
        self.tape.sources[self.sources[index].name] = tensor
        return self.fired(self.sources[index], tensor)


class Seams(_Hooked):
    """The cuts and broadcasts of one graph under one rule."""

    def __init__(self, model: nn.Module, graph: Graph, rule: Rule, feedback: nn.Module) -> None:
        super().__init__(graph.sites, graph.sources)
        self.model, self.rule, self.feedback, self.edges = model, rule, feedback, graph.edges
        place = {site: i for i, site in enumerate(graph.sites)}
        self.routes = [
            [(place[e.site], e) for e in graph.edges if e.source == source] for source in graph.sources
        ]
        self.edges_to = [[e for e in graph.edges if e.site == site] for site in graph.sites]
        self.local = {place[end.site]: end for end in graph.local}
        self._sites_by_taps = {site.taps: place[site] for site in graph.sites}
        self.recompute = (
            False  # whether the latest forward was cut, for a checkpoint that repeats a part of it
        )

    def meet(self, index: int, h: Tensor) -> Tensor:
        """Keep `h` and return it detached; a second consumer of the same tensor gets the same detached one."""
        tape = self.tape
        if tape is None:
            return h.detach() if self._repeated() else h
        cut, site = tape.cut[index], self.sites[index]
        if tape.seen[index] == len(site.taps) or (cut is not None and tape.h[index] is not h):
            raise SiteError(
                f"site {site.name!r} met a second tensor in one forward pass: the model does not run as it did "
                "on the example. Attach again with an example of this form, or name other sites."
            )
        tape.seen[index] += 1
        if cut is None:
            cut = h.detach()
            tape.order.append(index)
            tape.h[index], tape.cut[index], tape.versions[index] = h, cut, h._version
            if tape.sweep is not None:
                self.flush()
                tape.pending = (index, h, h._version)
            elif index in self.local and h.requires_grad and tape.target is not None:
                end = self.local[index]
                tape.losses.setdefault(end.source.name, []).append(self.local_loss(end, h, tape.target))
        kept = tape.sweep is None and torch.is_grad_enabled()
        if not kept and tape.seen[index] == len(site.taps):
            tape.h[index] = tape.cut[index] = None
        if index == tape.hold and not torch.is_grad_enabled():
            tape.held = h.detach()
            torch.set_grad_enabled(True)
        return cut

    def local_loss(self, end: Local, h: Tensor, target: Target) -> Tensor:
        """The loss of a site's auxiliary network, times the scale that the target was given."""
        output = self.feedback.get_submodule(end.key)(h)
        return self.rule.local_loss(output, target.raw) * target.scale

    def site_of(self, source: Source) -> int | None:
        """The number of the site that is the same tensor as the source, if there is one."""
        return self._sites_by_taps.get(source.taps)

    @contextmanager
    def sweeping(self, sweep: Sweep, target: Target | None = None) -> Iterator[Tape]:
        """A forward pass in which the sweep is told of each site when the next module begins: by then the code that
        called the last one has let go of the tensors in between, which would otherwise live through the backward."""
        handles = [m.register_forward_pre_hook(self.flush, prepend=True) for m in self.model.modules()]
        try:
            with self.recording(target, sweep) as tape:
                try:
                    yield tape
                    self.flush()
                except PassOverError:
                    tape.over = True
        finally:
            for handle in handles:
                handle.remove()

    def flush(self, *call: Any) -> None:
        """Tell the sweep what it has yet to be told."""
        if self.tape is not None and self.tape.pending is not None and self.tape.sweep is not None:
            pending, self.tape.pending = self.tape.pending, None
            self.tape.sweep.met(*pending)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While a segment's backward runs within a forward pass: a checkpoint in it repeats modules outside the tape."""
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
        """The source, with the signals of the activities hung on its error, and unless not `learn` the feedback's gradients."""
        weights: list[Tensor] = []
        for edge in edges:
            own = weights_of(self.feedback, edge)
            if edge.operator.renewed:  # the next pass changes them, perhaps before this one's backward
                own = tuple(B.clone() for B in own)
            elif edge.operator.common:  # several edges have the same, and a compiler takes no tensor twice
                own = tuple(B.view_as(B) for B in own)
            learned = learn and self.rule.learns_in_pass(edge)
            weights += own if learned else [B.detach() for B in own]
            if edge.borrows:
                weights.append(self.model.get_parameter(edge.borrows).detach())
        sent = None
        if target is not None and self.rule.needs == "target" and self.site_of(edges[0].source) is None:
            sent = target.one_hot(source)
        return Broadcast.apply(source, self.rule, edges, sent, *activities, *weights)

    def renew(self) -> None:
        """At the beginning of a pass: new weights for the edges whose operator makes them anew."""
        for edge in self.edges:
            if edge.operator.renewed:
                with torch.no_grad():
                    edge.operator.renew(weights_of(self.feedback, edge))

    def tied(self) -> dict[str, Tensor]:
        """The weights of the model whose gradient a feedback weight shares, ready to take the place of the plain ones."""
        shared = [(e, e.shares, self.model.get_parameter(e.shares)) for e in self.edges if e.shares]
        return {
            name: Share.apply(W, edge.operator, *weights_of(self.feedback, edge))
            for edge, name, W in shared
            if W.requires_grad
        }

    def fire(self, index: int, tensor: Tensor) -> Tensor:
        """Put the broadcast of this source's error in place; every site it feeds must have been met, unchanged."""
        tape = self.tape
        if tape is None:
            if self._repeated():
                raise SiteError(
                    f"a checkpoint repeats the module whose output's error is broadcast, {self.sources[index].name!r}, and a "
                    "broadcast cannot be repeated. Checkpoint the parts below it, or choose another error_at."
                )
            return tensor
        if self.sources[index].name in tape.sources:
            raise SiteError(
                f"the source {self.sources[index].name!r} was reached twice in one forward pass, so its sites would be "
                "fed twice. Attach again with an example of the form that is used in training."
            )
        source = self.sources[index]
        tape.order.append(source.name)
        if tape.sweep is not None:
            self.flush()
            tape.sources[source.name] = None
            return tape.sweep.fired(source, tensor)
        tape.sources[source.name] = tensor
        if source.name in tape.losses:
            tensor = Join.apply(tensor, *tape.losses[source.name])
        edges, activities = [], []
        for place, edge in self.routes[index]:
            h = tape.h[place]
            if h is None and tape.hold is not None and tape.seen[place]:
                continue  # below the held part
            self.check(edge, h, tape.versions[place], tensor)
            if h is not None and h.requires_grad:  # a segment with nothing to train gets no signal
                edges.append(edge)
                activities.append(h)
        if edges:
            tensor = self.broadcast(tensor, edges, activities, tape.target)
        return tensor if tape.hold is None else self._watched(tensor, source, tape)

    def _watched(self, tensor: Tensor, source: Source, tape: Tape) -> Tensor:
        """The source, whose error is put down in the backward pass."""
        if not tensor.requires_grad:
            tensor = tensor.detach().requires_grad_().clone()
        tensor.register_hook(lambda d: tape.errors.__setitem__(source.name, d))
        return tensor

    def _repeated(self) -> bool:
        """Whether this is a checkpoint that repeats, during backward, a part of a forward pass that was cut."""
        if not self.recompute or torch.compiler.is_compiling():  # a compiler repeats what it has recorded
            return False
        if torch._C._current_graph_task_id() != -1:
            return True
        self.recompute = (
            not torch.is_grad_enabled()
        )  # a plain pass of the model itself: its checkpoints are plain too
        return False

    def check(self, edge: Edge, h: Tensor | None, version: int, source: Tensor) -> None:
        """Refuse an edge whose site was not met, was changed in place, or does not fit its source in this pass."""
        site = edge.site
        if h is None:
            raise SiteError(
                f"site {site.name!r} was not reached before the source {edge.source.name!r} in this forward pass, so its "
                "layers would not be trained. The model must run the same modules in every training pass; name other sites."
            )
        # a compiler cannot branch on versions; attach's own eager pass has checked them
        if not torch.compiler.is_compiling() and h._version != version:
            raise SiteError(
                f"the activity at site {site.name!r} was changed in place after the cut (an inplace=True activation?), so "
                "feedback would learn from the wrong tensor. Use inplace=False there, or choose the changed tensor as site."
            )
        lead = edge.leading
        fits = h.shape[lead:] == edge.site_shape and source.shape[lead:].numel() == edge.source_size
        if edge.operator.sized and not fits:
            raise SiteError(
                f"site {site.name!r} got an activity of shape {list(h.shape)} and its source {list(source.shape)}, but its dense "
                f"feedback was made for features {list(edge.site_shape)} and {edge.source_size} source units. Dense feedback fits one "
                "input size: resize the inputs, or attach with an example of this size."
            )
        if h.shape[:lead] != source.shape[:lead]:
            raise SiteError(
                f"site {site.name!r} has leading dimensions {list(h.shape[:lead])} and the source {edge.source.name!r} "
                f"{list(source.shape[:lead])}: the batch must come first and be the same at both."
            )
        if source.shape[:lead].numel() < self.rule.least_batch:
            raise SiteError(
                f"{self.rule.label} with these options needs a batch of at least {self.rule.least_batch}, got "
                f"{source.shape[0]} (center=True subtracts the batch mean). Drop the last smaller batch."
            )


class _OutputHook:
    """Replaces a module's output tensor, or one tensor of its structured output. A class, so that a deep copy
    of the learner carries hooks of its own."""

    def __init__(self, seams: _Hooked, kind: str, index: int, tap: Tap) -> None:
        self.seams, self.kind, self.index, self.tap = seams, kind, index, tap

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        replace = self.seams.fire if self.kind == "fire" else self.seams.meet
        if self.tap.leaf is None and isinstance(output, Tensor):
            return replace(self.index, output)
        leaves, spec = tree_flatten(output)
        leaf = self.tap.leaf or 0
        if leaf >= len(leaves) or not isinstance(leaves[leaf], Tensor):
            raise SiteError(
                f"module {self.tap.module!r} did not return the tensor number {leaf} that it returned on the example; "
                "attach again with an example of the form that is used in training."
            )
        old, new = leaves[leaf], replace(self.index, leaves[leaf])
        return tree_unflatten([new if t is old else t for t in leaves], spec)


class _InputHook:
    """Replaces the input of those calls of a layer that are sites; `calls` maps the call's number to the site."""

    def __init__(self, seams: _Hooked, name: str, calls: dict[int, int]) -> None:
        self.seams, self.name, self.calls, self.most = seams, name, calls, max(calls)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        tape = self.seams.tape
        call = self.most
        if tape is not None:
            call = tape.calls.get(self.name, 0)
            tape.calls[self.name] = call + 1
            if call > self.most:
                raise SiteError(
                    f"layer {self.name!r} is called more often than on the example, so one of its inputs would not be "
                    "cut. Attach again with an example of the form that is used in training."
                )
        if call not in self.calls:
            return None
        if args:
            return (self.seams.meet(self.calls[call], args[0]), *args[1:]), kwargs
        return args, {**kwargs, "input": self.seams.meet(self.calls[call], kwargs["input"])}
