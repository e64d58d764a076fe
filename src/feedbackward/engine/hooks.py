"""Hooks at the sites and sources of a model, and the tape that a forward pass writes through them."""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.hooks import RemovableHandle

from feedbackward.activity import EVERY, FIRST, HookPoint, Site, Source
from feedbackward.engine.target import Target
from feedbackward.engine.transparent import Inert
from feedbackward.errors import SiteError
from feedbackward.graph import Branches
from feedbackward.model.values import by_place


class SegmentVisitor(Protocol):
    """A schedule that runs the backward of a segment within the forward pass."""

    def at_site(self, index: int, h: Tensor, version: int) -> None:
        """Run the backward pass of the segment that ends with `h`, the activity of site `index`.

        Nothing of `h` is kept. `version` is the version that it had when the pass reached the site.
        """

    def at_source(self, source: Source, tensor: Tensor) -> Tensor:
        """What the rest of the network gets in place of the source."""


class PassOverError(BaseException):
    """A visitor needs no more of the forward pass, which ends here.

    It is no `Exception`, so that a model's own handlers do not catch it.
    """


class Tape:
    """What one forward pass has reached so far.

    target: what `learner.target` was given.
    visitor: None in a joint pass.
    hold: the number of a site. A pass that began without gradients records them from this site on, and its backward
        pass then writes the errors of the sources into `errors`.
    """

    def __init__(
        self,
        sites: int,
        target: Target | None = None,
        visitor: SegmentVisitor | None = None,
        hold: int | None = None,
    ) -> None:
        # the activity of each site, attached to what made it
        self.h: list[Tensor | None] = [None] * sites
        # what the rest of the network got instead
        self.cut: list[Tensor | None] = [None] * sites
        self.versions = [0] * sites
        # what local losses of later sites read, detached, each with its version
        self.read: dict[int, tuple[Tensor, int]] = {}
        # how many of a site's hook points the pass has reached
        self.seen = [0] * sites
        self.calls: dict[str, int] = {}
        # of a site of every call: what the calls returned, each with its version
        self.steps: list[list[tuple[Tensor, int]]] = [[] for _ in range(sites)]
        self.sources: dict[str, Tensor | None] = {}
        # the inputs of residual branches, each with what its `Defer` holds
        self.deferred: list[tuple[Tensor, list[Tensor]]] = []
        self.target, self.visitor, self.hold = target, visitor, hold
        self.errors: dict[str, Tensor] = {}
        # sites by number and sources by name, in the order in which the pass reached them
        self.order: list[int | str] = []
        # the activity of the site `hold`
        self.held: Tensor | None = None
        # whether the visitor ended the pass
        self.over = False
        # a site that the visitor has not handled yet
        self.pending: tuple[int, Tensor, int] | None = None


class Hooked(ABC):
    """Hooks at sites and sources. They do nothing unless a tape is in place."""

    def __init__(
        self,
        sites: tuple[Site, ...],
        sources: tuple[Source, ...],
        branches: Branches | None = None,
    ) -> None:
        self.sites, self.sources, self.branches = sites, sources, branches
        self.tape: Tape | None = None

    @abstractmethod
    def on_site(self, index: int, h: Tensor) -> Tensor:
        """What the rest of the network gets in place of the activity of site `index`."""

    @abstractmethod
    def on_source(self, index: int, tensor: Tensor) -> Tensor:
        """What the rest of the network gets in place of source `index`."""

    def on_beside(self, tensor: Tensor) -> Tensor:
        """What the rest of the network gets of another tensor that a module returns beside a site of every call."""
        return tensor

    def on_branch(self, index: int, h: Tensor) -> Tensor:
        """What a residual branch gets in place of its input."""
        return h

    def on_swept(self, index: int, tensor: Tensor) -> Tensor:
        """What the rest of the network gets in place of the source of the branches."""
        return tensor

    def install(self, model: nn.Module, prepend: bool = False) -> list[RemovableHandle]:
        """Register the hooks; where a tensor is both source and site, the broadcast comes before the cut."""
        handles = []
        inputs: dict[str, dict[int, list[tuple[str, int, str]]]] = {}
        of = self.branches
        # an error is swept before it is broadcast; a branch begins below the cut of its first layer
        kinds = (
            ("source", self.sources),
            ("swept", (of.source,) if of else ()),
            ("branch", of.inputs if of else ()),
            ("site", self.sites),
        )
        # of prepended hooks the last one runs first
        for kind, activities in reversed(kinds) if prepend else kinds:
            for index, activity in enumerate(activities):
                for point in activity.points:
                    if point.kind == "input":
                        calls = inputs.setdefault(point.module, {})
                        calls.setdefault(point.call, []).append((kind, index, point.place))
                    else:
                        hook = _OutputHook(self, kind, index, point)
                        handles.append(
                            model.get_submodule(point.module).register_forward_hook(
                                hook, prepend=prepend
                            )
                        )
        for name, calls in inputs.items():
            pre = _InputHook(self, name, calls)
            handles.append(
                model.get_submodule(name).register_forward_pre_hook(
                    pre, with_kwargs=True, prepend=prepend
                )
            )
        return handles

    def on(self, kind: str) -> Callable[[int, Tensor], Tensor]:
        """What replaces a tensor of this kind."""
        return getattr(self, f"on_{kind}")

    @contextmanager
    def recording(
        self,
        target: Target | None = None,
        visitor: SegmentVisitor | None = None,
        hold: int | None = None,
    ) -> Iterator[Tape]:
        """Use one tape for a forward pass, and drop it at the end. Refuse a pass that missed a site or a source."""
        if self.tape is not None:
            raise SiteError(
                "a forward pass of this learner runs already (in another thread?): use one learner per thread."
            )
        self.tape = Tape(len(self.sites), target, visitor, hold)
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


class Observer(Hooked):
    """Records the activities of sites and sources, without cuts.

    change: replaces the activity of a site.
    onward: replaces what the layers above a source get.
    """

    def __init__(
        self,
        sites: tuple[Site, ...],
        sources: tuple[Source, ...],
        change: Callable[[Site, Tensor], Tensor] | None = None,
        onward: Callable[[Source, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(sites, sources)
        self.change, self.onward = change, onward

    def on_site(self, index: int, h: Tensor) -> Tensor:
        if self.tape is not None:
            self.tape.h[index] = h
            self.tape.seen[index] += 1
            if self.change is not None:
                return self.change(self.sites[index], h)
        return h

    def on_source(self, index: int, tensor: Tensor) -> Tensor:
        if self.tape is not None:
            self.tape.sources[self.sources[index].name] = tensor
            if self.onward is not None:
                tensor = self.onward(self.sources[index], tensor)
        # a later in-place operation must not change the kept tensor
        return tensor.clone()


class Director(Hooked):
    """Asks two functions what the rest of the network gets at a site and at a source."""

    def __init__(self, sites: tuple[Site, ...], sources: tuple[Source, ...]) -> None:
        super().__init__(sites, sources)
        self.at_site: Callable[[int, Tensor], Tensor] = lambda index, h: h
        self.at_source: Callable[[Source, Tensor], Tensor] = lambda source, tensor: tensor

    @contextmanager
    def directing(
        self,
        at_site: Callable[[int, Tensor], Tensor],
        at_source: Callable[[Source, Tensor], Tensor],
        whole: bool = True,
    ) -> Iterator[None]:
        """Run a pass under these functions. It may leave out sites unless `whole`; `PassOverError` ends it."""
        self.at_site, self.at_source = at_site, at_source
        with self.recording() as tape:
            tape.over = not whole
            try:
                yield
            except PassOverError:
                tape.over = True

    def on_site(self, index: int, h: Tensor) -> Tensor:
        tape = self.tape
        # without a tape, a checkpoint repeats a module in the backward pass
        if tape is None:
            return h.detach() if torch._C._current_graph_task_id() != -1 else h
        tape.seen[index] += 1
        if tape.cut[index] is None or tape.h[index] is not h:
            tape.h[index], tape.cut[index] = h, self.at_site(index, h)
        return tape.cut[index]  # type: ignore[return-value]

    def on_source(self, index: int, tensor: Tensor) -> Tensor:
        if self.tape is None:
            return tensor
        self.tape.sources[self.sources[index].name] = tensor
        return self.at_source(self.sources[index], tensor)


class _OutputHook(Inert):
    """Replaces a module's output tensor, or one tensor of its structured output."""

    def __init__(self, cuts: Hooked, kind: str, index: int, point: HookPoint) -> None:
        self.cuts, self.kind, self.index, self.point = cuts, kind, index, point

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        replace = self.cuts.on(self.kind)
        if self.point.leaf is None and isinstance(output, Tensor):
            return replace(self.index, output)
        leaves, spec = tree_flatten(output)
        leaf = self.point.leaf or 0
        if leaf >= len(leaves) or not isinstance(leaves[leaf], Tensor):
            raise SiteError(
                f"module {self.point.module!r} did not return the tensor number {leaf} that it returned on the example; "
                "attach again with an example of the form that is used in training."
            )
        old, new = leaves[leaf], replace(self.index, leaves[leaf])
        if self.point.call == EVERY:
            leaves = [self.cuts.on_beside(t) if isinstance(t, Tensor) else t for t in leaves]
            leaves[leaf] = old
        return tree_unflatten([new if t is old else t for t in leaves], spec)


class _InputHook(Inert):
    """Replaces those inputs of a layer that are sites.

    calls: for the number of each call, its sites, each with the place of its tensor among the arguments and keywords.
    """

    def __init__(
        self, cuts: Hooked, name: str, calls: dict[int, list[tuple[str, int, str]]]
    ) -> None:
        self.cuts, self.name, self.calls, self.most = cuts, name, calls, max(calls)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        tape = self.cuts.tape
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
        sites = self.calls[call]
        if (
            len(sites) == 1
            and sites[0][2] == FIRST
            and len(args) == 1
            and not kwargs
            and isinstance(args[0], Tensor)
        ):
            return (self.cuts.on(sites[0][0])(sites[0][1], args[0]),), kwargs
        given, spec = by_place(args, kwargs)
        for kind, index, place in sites:
            old = given.get(place if place in given else _other_place(module, place))
            if not isinstance(old, Tensor):
                raise SiteError(
                    f"layer {self.name!r} did not get the tensor at {place} of (arguments, keywords) that it got on the example; "
                    "call it with the same arguments in every pass, or attach again with an example of the form that is used in "
                    "training."
                )
            new = self.cuts.on(kind)(index, old)
            # a tensor that is passed twice must be cut in both places
            given = {p: new if t is old else t for p, t in given.items()}
        return tree_unflatten(given.values(), spec)


def _other_place(module: nn.Module, place: str) -> str:
    """For an argument that is given by position the place by keyword, and the other way round."""
    names = list(inspect.signature(module.forward).parameters)
    kind, key, rest = re.fullmatch(r"\[([01])\]\[([^]]*)\](.*)", place).groups()  # type: ignore[union-attr]
    if kind == "0":
        return f"[1][{names[int(key)]!r}]{rest}" if int(key) < len(names) else ""
    name = key.strip("'")
    return f"[0][{names.index(name)}]{rest}" if name in names else ""
