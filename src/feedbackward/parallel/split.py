"""Where a model is divided: the places at which it can be, and the division that is balanced."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from feedbackward.activity import HookPoint, LayerInput, Site
from feedbackward.engine.hooks import Observer
from feedbackward.errors import AttachError
from feedbackward.learner import Learner
from feedbackward.model.autograd_graph import dominators, outputs_behind
from feedbackward.model.example import run
from feedbackward.model.sites import find_sites
from feedbackward.model.source import source_tensor
from feedbackward.model.state import preserved, training_mode
from feedbackward.model.trace import Trace, trace
from feedbackward.model.values import tensors_in
from feedbackward.parallel.simulate import StageCost

# a segment is timed so often, and the shortest time counts
_ROUNDS = 3


def find_places(
    learner: Learner, example: Any, named: Sequence[str]
) -> tuple[tuple[Site, ...], tuple[int, ...]]:
    """The places at which the model may be divided, in forward order; and the numbers of those that
    were named.

    A place is an activity that everything below passes through: a site that the rule cuts, or for
    rules that cut none, an activity that enters a layer. A name of an activity that the rule cuts is
    that site, whichever module the site is named after. Raises AttachError for a named one round which
    another path leads.
    """
    device = next(learner.model.parameters()).device.type
    # casts of weights would be nodes that lead round every activity
    with torch.autocast(device, enabled=False):
        recorded = trace(learner.model, example)
    sites: Sequence[Site] = [s for s in learner.graph.sites if not isinstance(s, LayerInput)]
    if not sites:
        sites = find_sites(learner.model, recorded, "layers", learner.source)
    final, _ = source_tensor(recorded, learner.source)
    through = dominators(final)
    chosen = find_sites(learner.model, recorded, named, learner.source) if named else []
    for site in chosen:
        if _tensor(recorded, site.points[0]).grad_fn not in through:
            raise AttachError(
                f"the model cannot be divided at {site.name!r}: another path (a skip connection, a branch) leads round it, "
                f"and one activity alone is sent to the next stage. Places where it can be: {_names(sites)}."
            )
    cut = {_activity(recorded, site.points[0]): site for site in sites}
    chosen = [cut.get(_activity(recorded, site.points[0]), site) for site in chosen]
    by_points = {site.points: site for site in (*sites, *chosen)}
    places = [
        site for site in by_points.values() if _tensor(recorded, site.points[0]).grad_fn in through
    ]
    places.sort(key=lambda site: _time(recorded, site.points[0]))
    points = [place.points for place in places]
    return tuple(places), tuple(points.index(site.points) for site in chosen)


def _names(sites: Sequence[Site]) -> str:
    return ", ".join(site.name for site in sites[:8]) + (", ..." if len(sites) > 8 else "")


def _tensor(recorded: Trace, point: HookPoint) -> Tensor:
    return _met(recorded, point)[0]


def _activity(recorded: Trace, point: HookPoint) -> tuple[int, int]:
    """What identifies an activity in a trace: a block and its last layer, say, have one output."""
    tensor, version = _met(recorded, point)
    return id(tensor), version


def _met(recorded: Trace, point: HookPoint) -> tuple[Tensor, int]:
    """The tensor at a point, and the version that it had there."""
    calls = [call for call in recorded.calls if call.name == point.module]
    call = calls[point.call]
    if point.kind == "output":
        return call.outputs[point.leaf or 0]
    return call.inputs[call.places.index(point.place)]


def _time(recorded: Trace, point: HookPoint) -> int:
    call = [call for call in recorded.calls if call.name == point.module][point.call]
    return call.end if point.kind == "output" else call.start


def cut_points(learner: Learner) -> set[tuple[HookPoint, ...]]:
    """Where the rule cuts an activity for all that use it; a cut of one layer's input is none."""
    return {site.points for site in learner.graph.sites if not isinstance(site, LayerInput)}


def segment_costs(learner: Learner, example: Any, places: tuple[Site, ...]) -> list[StageCost]:
    """What each segment between places costs on this machine for such a batch, the lowest first:
    seconds, and the bytes of its activity and of what autograd keeps for its backward."""
    runs = [_Timing(learner.model, example, places).costs() for _ in range(_ROUNDS)]
    return [
        replace(
            first,
            forward=min(cost.forward for cost in costs),
            inputs=min(cost.inputs for cost in costs),
            weights=min(cost.weights for cost in costs),
        )
        for first, costs in zip(runs[0], zip(*runs, strict=True), strict=True)
    ]


def segment_times(learner: Learner, example: Any, places: tuple[Site, ...]) -> list[float]:
    """Seconds of the forward and backward of each segment under the learner's rule: with the
    gradients of inputs where it does not cut the place below."""
    cut = cut_points(learner)
    whole = [True, *(place.points not in cut for place in places)]
    costs = segment_costs(learner, example, places)
    return [
        cost.forward + cost.weights + (cost.inputs if uncut else 0.0)
        for cost, uncut in zip(costs, whole, strict=True)
    ]


class _Timing:
    """A pass in which every segment has a graph of its own."""

    def __init__(self, model: nn.Module, example: Any, places: tuple[Site, ...]) -> None:
        self.ends: list[list[Tensor]] = []
        self.inputs: list[Tensor | None] = [None]
        self.clock = [time.perf_counter()]
        self.held = [0]
        self._onward: dict[Site, Tensor] = {}
        observer = Observer(places, (), self._meet)
        handles = observer.install(model)
        saving = torch.autograd.graph.saved_tensors_hooks(self._save, lambda t: t)
        known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        self._seen = known
        with preserved(model), training_mode(model), torch.enable_grad(), saving:
            try:
                with observer.recording():
                    output = run(model, example)
            finally:
                for handle in handles:
                    handle.remove()
        self.clock.append(time.perf_counter())
        self.ends.append([t for t in tensors_in(output) if t.requires_grad])

    def _meet(self, place: Site, h: Tensor) -> Tensor:
        if place not in self._onward:
            self.clock.append(time.perf_counter())
            self.ends.append([h] if h.requires_grad else [])
            self.held.append(0)
            into = h.detach().requires_grad_(h.is_floating_point())
            self.inputs.append(into)
            # a copy: what follows may work in place, which a leaf does not allow
            self._onward[place] = into.clone()
        return self._onward[place]

    def _save(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self.held[-1] += storage.nbytes()
        return tensor

    def costs(self) -> list[StageCost]:
        """Run the backward of every segment, with and without the gradient of its input."""
        forwards = [b - a for a, b in itertools.pairwise(self.clock)]
        found = []
        for forward, ends, into, held in zip(
            forwards, self.ends, self.inputs, self.held, strict=True
        ):
            own = [leaf for leaf in leaves(ends) if leaf is not into]
            weights = _backward_time(ends, own)
            both = weights
            if into is not None and into.requires_grad:
                both = _backward_time(ends, [*own, into])
            sends = sum(t.nbytes for t in ends)
            extra = max(0.0, both - weights)
            found.append(StageCost(forward, extra, weights, sends=sends, holds=held))
        return found


def _backward_time(ends: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    start = time.perf_counter()
    if ends and wanted:
        ones = [torch.ones_like(t) for t in ends]
        torch.autograd.grad(ends, wanted, ones, retain_graph=True, allow_unused=True)
    return time.perf_counter() - start


def leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The parameters and other leaves that these tensors depend on."""
    found: dict[int, Tensor] = {}
    for tensor in tensors:
        for node, _ in outputs_behind(tensor):
            variable = getattr(node, "variable", None)
            if variable is not None:
                found[id(variable)] = variable
    return list(found.values())
