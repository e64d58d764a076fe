"""Finding the sites of a model: `"layers"`, every k-th of them, `"stages"`, `"blocks"`, names, or a predicate."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from torch import Tensor, nn

from feedbackward.activity import HookPoint, ModelInput, PreActivation, Site, Source
from feedbackward.errors import AttachError, SiteError
from feedbackward.model.autograd_graph import made_by, outputs_behind
from feedbackward.model.blocks import block_names
from feedbackward.model.places import (
    activity_place,
    called_once,
    float_leaf,
    known_modules,
    output_place,
)
from feedbackward.model.repeated import every_call
from feedbackward.model.source import source_tensor
from feedbackward.model.token_axis import TokenAxis
from feedbackward.model.trace import ELEMENTWISE, Call, Trace

Sites = str | Sequence[str] | Callable[[str, nn.Module], bool]
S = TypeVar("S", bound=Site)


def find_sites(model: nn.Module, trace: Trace, sites: Sites, source: Source) -> list[Site]:
    """The sites in forward order, all of them before the source and on the way to it.

    Raises SiteError for names that are unknown, not called, called twice or beyond the source, and
    AttachError where the model has no site.
    """
    finder = _Finder(trace, source)
    return [finder.placed(site) for site in _found(finder, model, trace, sites)]


def _found(finder: _Finder, model: nn.Module, trace: Trace, sites: Sites) -> list[Site]:
    if sites == "layers":
        return finder.layers()
    if sites == "stages":
        return finder.stages()
    if sites == "blocks":
        return finder.named(block_names(model, trace), chosen=False)
    if isinstance(sites, str) and sites.startswith("every-"):
        return finder.layers()[:: -_every(sites)][::-1]
    if isinstance(sites, str):
        sites = [sites]
    if not callable(sites) and not sites:
        raise SiteError('sites is empty: name at least one module, or use "layers" or "blocks".')
    if callable(sites):
        picked = [name for name, module in model.named_modules() if name and sites(name, module)]
        return finder.named(picked, chosen=False)
    return finder.named(known_modules(model, sites))


def find_pre_activations(
    model: nn.Module, trace: Trace, sites: Sites, source: Source
) -> list[PreActivation]:
    """What enters the elementwise activation modules, in forward order; `sites` is "layers", names or a predicate.

    Raises SiteError for a name that is no such module on the way to the source, and AttachError where there is none.
    """
    finder = _Finder(trace, source)
    if isinstance(sites, str) and (sites in ("blocks", "stages") or sites.startswith("every-")):
        raise AttachError(
            f'sites={sites!r} are no inputs of activations, whose derivative is to be replaced: use sites="layers", or name '
            "activation modules."
        )
    wanted = None
    if callable(sites):
        wanted = [name for name, module in model.named_modules() if sites(name, module)]
    elif sites != "layers":
        wanted = known_modules(model, [sites] if isinstance(sites, str) else sites)
    found, names = finder.pre_activations(wanted)
    missing = [name for name in wanted or () if name not in names and not callable(sites)]
    if missing or not found:
        named = repr(missing[0]) if missing else f"what {type(model).__name__} has"
        raise SiteError(
            f"{named} is no elementwise activation module (nn.ReLU, nn.Tanh) on the way to the source, so there is no derivative to "
            "replace: write functional activations as modules, name others, or leave out derivative=."
        )
    return found


def find_input(model: nn.Module, trace: Trace, sites: Sites, source: Source) -> list[Site]:
    """The model's input, and what enters the activation modules.

    Raises AttachError where the model has not one floating-point input, and as `find_pre_activations` does.
    """
    into = model_input(trace)
    if into is None:
        count = sum(t.is_floating_point() for t, _ in trace.calls_of("")[0].inputs)
        raise AttachError(
            f"{type(model).__name__} has {count} floating-point inputs, and the error is added to the one input that a model "
            "has: it takes numbers that an error can be added to, not indices. Use another rule (DFA, DKP)."
        )
    return [into, *find_pre_activations(model, trace, sites, source)]


def model_input(trace: Trace) -> ModelInput | None:
    """The input of the model, if it has one of floating-point numbers."""
    (whole,) = trace.calls_of("")
    floats = [i for i, (t, _) in enumerate(whole.inputs) if t.is_floating_point()]
    if len(floats) != 1:
        return None
    tensor, _ = whole.inputs[floats[0]]
    name = "input" if "input" not in trace.counts else "the model's input"
    point = HookPoint("", "input", place=whole.places[floats[0]])
    found: ModelInput = activity_place(ModelInput, trace, name, (point,), tensor, whole.start)
    return found


class _Finder:
    """Turns tensors and module names into sites, and keeps those that lead to the source."""

    def __init__(self, trace: Trace, source: Source) -> None:
        self.trace, self.source = trace, source
        self.source_tensor, self.source_end = source_tensor(trace, source)
        self.upstream = outputs_behind(self.source_tensor)

    def placed(self, site: S) -> S:
        """The site, `apart` if its tokens are not those of the source."""
        if not self.source.tokens or site.tokens != 1 or site.every:
            return site
        made = made_by(self.trace.tensor_at(site.points[0]))
        return replace(site, apart=not self._axis.is_in(made, site.shape[0]))

    @functools.cached_property
    def _axis(self) -> TokenAxis:
        return TokenAxis(self.source_tensor, self.source.tokens)

    def layers(self) -> list[Site]:
        """The activity that enters each parametric layer after the first; one site per distinct tensor."""
        calls = [c for c in self.trace.calls if c.is_layer]
        if not calls:
            raise AttachError(
                "no module of the model multiplies an activity with a weight, as Linear and convolutions do, so there is nothing to "
                'feed; name the sites yourself with `sites=["name", ...]`.'
            )
        entering = [
            (call, *activity) for call in calls if call.inputs for activity in call.activities
        ]
        first = entering[0][2]
        found: dict[int, Site] = {}
        for call, number, tensor, version in entering:
            if (
                tensor is first
                or id(tensor) in found
                or not self._reaches_source(tensor, call.start)
            ):
                continue
            consumers = [(c, n) for c, n, t, v in entering if t is tensor and v == version]
            found[id(tensor)] = self._site(call, number, tensor, version, consumers)
        return list(found.values())

    def pre_activations(self, wanted: Sequence[str] | None) -> tuple[list[PreActivation], set[str]]:
        """What enters each activation module of these names, one site per distinct tensor; and the modules that were met."""
        calls = [c for c in self.trace.calls if type(c.module) in ELEMENTWISE]
        found: dict[int, PreActivation] = {}
        names = set()
        for call in calls:
            number, tensor, version = call.activity
            left_out = wanted is not None and call.name not in wanted
            if left_out or not self._reaches_source(tensor, call.start):
                continue
            names.add(call.name)
            entering = [(c, *c.activity) for c in calls]
            takers = [(c, n) for c, n, t, v in entering if t is tensor and v == version]
            site = self._site(call, number, tensor, version, takers)
            f = call.module.forward
            kept = (site.name, site.points, site.shape, site.tokens, site.unflattened)
            found.setdefault(id(tensor), PreActivation(*kept, activation=f))
        return [self.placed(site) for site in found.values()], names

    def stages(self) -> list[Site]:
        """The last of the layers' sites, and those that a pool or a stride made.

        The latter have another height and width than the site before them, or than the input.
        """
        sites = self.layers()
        images = [call.activity[1] for call in self.trace.calls if call.is_layer and call.inputs]
        before = [tuple(images[0].shape[2:]), *(site.shape[1:] for site in sites)]
        return [
            s
            for s, space in zip(sites, before, strict=False)
            if s.shape[1:] != space or s is sites[-1]
        ]

    def named(self, names: Iterable[str], chosen: bool = True) -> list[Site]:
        """The outputs of these modules, one site per tensor. Names that the user chose must all be usable."""
        found: dict[tuple[int, int], tuple[int, Site]] = {}
        for name in names:
            if not chosen and name not in self.trace.counts:
                continue
            calls = self.trace.calls_of(name)
            if len(calls) > 1:
                site = self._every_call(calls)
                found[id(site), 0] = calls[0].end, site
                continue
            call = called_once(self.trace, name)
            leaves = self._leaves(call)
            if len(leaves) > 1:
                raise SiteError(
                    f"module {name!r} returns {len(leaves)} tensors that lead to the source, and a cut of one would "
                    "leave the others whole. Name a module that returns one tensor."
                )
            if leaves:
                leaf, tensor, version = leaves[0]
                other = found.get((id(tensor), version))
                # a container returns what its last part made
                if other is None or call.end < other[0]:
                    found[id(tensor), version] = (
                        call.end,
                        output_place(Site, self.trace, call, leaf),
                    )
            elif chosen:
                raise SiteError(
                    f"site {name!r} is not on the way to the source: its output comes after the tensor whose error is "
                    "broadcast, does not lead to it, or depends on no parameter. Choose an earlier site or a later error_at."
                )
        return [site for _, site in sorted(found.values(), key=lambda pair: pair[0])]

    def _every_call(self, calls: list[Call]) -> Site:
        """One site of all calls of a module, each of which must lead to the source."""
        leaf = float_leaf(calls[0])
        if not all(self._reaches_source(c.outputs[leaf][0], c.end) for c in calls):
            raise SiteError(
                f"module {calls[0].name!r} is called {len(calls)} times in one forward pass, and not every call leads to the source "
                f"{self.source.name!r} before it is made, so some would get an error that is not theirs. Name another module, or "
                "choose a later error_at."
            )
        return every_call(self.trace, calls, leaf, self.source, self.source_tensor)

    def _leaves(self, call: Call) -> list[tuple[int, Tensor, int]]:
        """The distinct tensors that the call returned and that lead to the source, with their numbers and versions."""
        float_leaf(call)
        leaves: dict[int, tuple[int, Tensor, int]] = {}
        for leaf, (tensor, version) in enumerate(call.outputs):
            if isinstance(tensor, Tensor) and self._reaches_source(tensor, call.end):
                leaves.setdefault(id(tensor), (leaf, tensor, version))
        return list(leaves.values())

    def _site(
        self,
        call: Call,
        number: int,
        tensor: Tensor,
        version: int,
        consumers: list[tuple[Call, int]],
    ) -> Site:
        """Cut where a module makes the tensor, so that every consumer sees the cut; otherwise at the layers' inputs."""
        made = self.trace.producer(tensor, version, call.start)
        if made is not None:
            return output_place(Site, self.trace, *made)
        points = tuple(HookPoint(c.name, "input", c.index, place=c.places[n]) for c, n in consumers)
        name = f"{call.name}.input" + (f"#{call.index}" if call.index else "")
        if number != call.activity[0]:
            name += f"[{number}]"
        return activity_place(Site, self.trace, name, points, tensor, call.start)

    def _reaches_source(self, tensor: Tensor, when: int) -> bool:
        if when >= self.source_end or tensor is self.source_tensor or not tensor.requires_grad:
            return False
        return (tensor.grad_fn, tensor.output_nr) in self.upstream


def _every(sites: str) -> int:
    """The k of `every-k`."""
    number = sites.removeprefix("every-")
    if not number.isdecimal() or int(number) < 1:
        raise SiteError(
            f"sites={sites!r} must end in a number: 'every-2' feeds every second layer, from the last hidden one down."
        )
    return int(number)


def refuse_unrecorded(trace: Trace) -> None:
    """Refuse a layer without a recorded graph: nothing would train it, or backprop would, past the cuts."""
    for call in trace.calls:
        if not call.grad_enabled and any(
            p.requires_grad for p in call.module.parameters(recurse=False)
        ):
            raise AttachError(
                f"layer {call.name!r} runs without gradients (torch.no_grad, or a reentrant checkpoint), yet its "
                "parameters are trainable. Use checkpoint(..., use_reentrant=False), or freeze them."
            )
