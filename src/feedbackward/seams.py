"""The seams of a model: cuts, the broadcast of errors, and observation. The only file with hooks and autograd functions.

At a cut the activity `h`, still attached to the segment that made it, is kept on the tape, and the rest of the
network gets `h.detach()`. At a source, `Broadcast` returns the tensor unchanged and takes the kept activities as
further inputs, so that autograd itself hands each its teaching signal and each feedback weight its gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.hooks import RemovableHandle

from .errors import SiteError
from .graph import Edge, Graph, Site, Source, Tap
from .rules.base import Rule


class Broadcast(torch.autograd.Function):
    """Identity on a source; its backward sends the source's error along the edges.

    forward(source, rule, edges, h_1..h_k, B_1..B_k) -> source. Backward, with `d = dLoss/dsource`: `d` for the source,
    the teaching signal shaped like `h_i` for each activity, and the rule's gradient for each learned `B_i`.
    """

    @staticmethod
    def forward(ctx: Any, source: Tensor, rule: Rule, edges: Sequence[Edge], *tensors: Tensor) -> Tensor:
        k = len(edges)
        ctx.rule, ctx.edges = rule, edges
        ctx.kinds = [(h.shape, h.dtype) for h in tensors[:k]]
        correlated = rule.learned and any(edge.shares is None for edge in edges)
        ctx.save_for_backward(*(tensors if correlated else tensors[k:]))
        return source.detach()  # not a view: an in-place operation may follow

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        saved, k = ctx.saved_tensors, len(ctx.edges)
        activities, weights = saved[:-k], saved[-k:]
        signals: list[Tensor | None] = []
        grads: list[Tensor | None] = []
        for i, (edge, B, (shape, dtype)) in enumerate(zip(ctx.edges, weights, ctx.kinds, strict=True)):
            lead = edge.leading
            error = d.to(dtype).flatten(0, lead - 1)
            signal = (
                edge.operator.send(B.to(dtype), error, tuple(shape[lead:]))
                if ctx.needs_input_grad[3 + i]
                else None
            )
            signals.append(None if signal is None else signal.reshape(shape))
            grad = None
            if ctx.needs_input_grad[3 + k + i]:
                grad = ctx.rule.feedback_grad(edge, B, error, activities[i].flatten(0, lead - 1)).to(B.dtype)
            grads.append(grad)
        return (d, None, None, *signals, *grads)


class Share(torch.autograd.Function):
    """`W` as it is; its backward gives the same gradient to `W` and to `B`, so that it is computed once."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, B: Tensor) -> Tensor:
        return W.view_as(W)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.clone()


class Tape:
    """What one forward pass has met so far."""

    def __init__(self, sites: int) -> None:
        self.h: list[Tensor | None] = [None] * sites  # attached activities
        self.cut: list[Tensor | None] = [None] * sites  # what the rest of the network got instead
        self.versions = [0] * sites
        self.calls: dict[str, int] = {}
        self.sources: dict[str, Tensor] = {}


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
        for kind, activities in (("fire", self.sources), ("meet", self.sites)):
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
    def recording(self) -> Iterator[Tape]:
        """One tape per forward pass, dropped at its end. A pass that missed a site or source is refused."""
        if self.tape is not None:
            raise SiteError(
                "a forward pass of this learner runs already (in another thread?): use one learner per thread."
            )
        self.tape = Tape(len(self.sites))
        try:
            yield self.tape
            self._complete(self.tape)
        finally:
            self.tape = None

    def _complete(self, tape: Tape) -> None:
        missed = [site.name for site, h in zip(self.sites, tape.h, strict=True) if h is None]
        missed += [source.name for source in self.sources if source.name not in tape.sources]
        if missed:
            raise SiteError(
                f"{missed[0]!r} was not reached in this forward pass, so layers below it would not be trained. The model "
                "must run the same modules in every training pass; name other sites, or run it under `learner.exact()`."
            )


class Observer(_Hooked):
    """Records the activities of sites and sources and changes nothing: the true gradients flow."""

    def meet(self, index: int, h: Tensor) -> Tensor:
        if self.tape is not None:
            self.tape.h[index] = h
        return h

    def fire(self, index: int, tensor: Tensor) -> Tensor:
        if self.tape is not None:
            self.tape.sources[self.sources[index].name] = tensor
        return tensor.clone()  # an in-place operation that follows must not change the tensor that was kept


class Seams(_Hooked):
    """The cuts and broadcasts of one graph under one rule."""

    def __init__(self, graph: Graph, rule: Rule, feedback: nn.Module) -> None:
        super().__init__(graph.sites, graph.sources)
        self.rule, self.feedback, self.edges = rule, feedback, graph.edges
        place = {site: i for i, site in enumerate(graph.sites)}
        self.routes = [
            [(place[e.site], e) for e in graph.edges if e.source == source] for source in graph.sources
        ]
        self.recompute = (
            False  # whether the latest forward was cut, for a checkpoint that repeats a part of it
        )

    def meet(self, index: int, h: Tensor) -> Tensor:
        """Keep `h` and return it detached; a second consumer of the same tensor gets the same detached one."""
        tape = self.tape
        if tape is None:
            return h.detach() if self._repeated() else h
        cut = tape.cut[index]
        if cut is None:
            cut = h.detach()
            tape.h[index], tape.cut[index], tape.versions[index] = h, cut, h._version
        elif tape.h[index] is not h:
            raise SiteError(
                f"site {self.sites[index].name!r} met a second tensor in one forward pass: the model does not run as it did "
                "on the example. Attach again with an example of this form, or name other sites."
            )
        return cut

    def tied(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights of the model whose gradient a feedback weight shares, ready to take the place of the plain ones."""
        shared = [
            (e.shares, model.get_parameter(e.shares), getattr(self.feedback, e.key))
            for e in self.edges
            if e.shares
        ]
        return {name: Share.apply(W, B) for name, W, B in shared if W.requires_grad}

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
        tape.sources[self.sources[index].name] = tensor
        edges, activities = [], []
        for place, edge in self.routes[index]:
            h = tape.h[place]
            self._check(edge, h, tape.versions[place], tensor)
            if h is not None and h.requires_grad:  # a segment with nothing to train gets no signal
                edges.append(edge)
                activities.append(h)
        if not edges:
            return tensor
        weights = [getattr(self.feedback, edge.key) for edge in edges]
        weights = [B if edge.shares is None else B.detach() for edge, B in zip(edges, weights, strict=True)]
        return Broadcast.apply(tensor, self.rule, edges, *activities, *weights)

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

    def _check(self, edge: Edge, h: Tensor | None, version: int, source: Tensor) -> None:
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
