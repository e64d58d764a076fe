"""Where a model is divided: the places at which it can be, and the division that is balanced."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from feedbackward.engine.hooks import Observer
from feedbackward.errors import AttachError
from feedbackward.graph import HookPoint, LayerInput, Site
from feedbackward.learner import Learner
from feedbackward.model.example import run
from feedbackward.model.sites import find_sites, source_tensor
from feedbackward.model.state import preserved, training_mode
from feedbackward.model.trace import Trace, dominators, gradient_edges, trace
from feedbackward.model.values import tensors_in

# a segment is timed so often, and the shortest time counts
_ROUNDS = 3


def find_places(
    learner: Learner, example: Any, named: Sequence[str]
) -> tuple[tuple[Site, ...], tuple[int, ...]]:
    """The places at which the model may be divided, in forward order; and the numbers of those that
    were named.

    A place is an activity that everything below passes through: a site that the rule cuts, or for
    rules that cut none, an activity that enters a layer. Raises AttachError for a named one round
    which another path leads.
    """
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
    calls = [call for call in recorded.calls if call.name == point.module]
    call = calls[point.call]
    if point.kind == "output":
        return call.outputs[point.leaf or 0][0]
    return call.inputs[call.places.index(point.place)][0]


def _time(recorded: Trace, point: HookPoint) -> int:
    call = [call for call in recorded.calls if call.name == point.module][point.call]
    return call.end if point.kind == "output" else call.start


def cut_points(learner: Learner) -> set[tuple[HookPoint, ...]]:
    """Where the rule cuts an activity for all that use it; a cut of one layer's input is none."""
    return {site.points for site in learner.graph.sites if not isinstance(site, LayerInput)}


def segment_times(learner: Learner, example: Any, places: tuple[Site, ...]) -> list[float]:
    """Seconds of the forward and backward of each segment between places, the lowest first.

    Of rules that cut nothing at the places the gradients of the inputs are computed as well.
    """
    cut = cut_points(learner)
    best = [float("inf")] * (len(places) + 1)
    for _ in range(_ROUNDS):
        best = list(map(min, best, _times(learner.model, example, places, cut)))
    return best


def _times(
    model: nn.Module, example: Any, places: tuple[Site, ...], cut: set[tuple[HookPoint, ...]]
) -> list[float]:
    ends: list[Tensor] = []
    onward: dict[Site, Tensor] = {}
    clock = [time.perf_counter()]

    def meet(place: Site, h: Tensor) -> Tensor:
        if place not in onward:
            clock.append(time.perf_counter())
            ends.append(h)
            # a copy: what follows may work in place, which a leaf does not allow
            onward[place] = h.detach().requires_grad_(place.points not in cut).clone()
        return onward[place]

    observer = Observer(places, (), meet)
    handles = observer.install(model)
    with preserved(model), training_mode(model), torch.enable_grad():
        try:
            with observer.recording():
                output = run(model, example)
        finally:
            for handle in handles:
                handle.remove()
        clock.append(time.perf_counter())
        forwards = [b - a for a, b in itertools.pairwise(clock)]
        final = [t for t in tensors_in(output) if t.requires_grad]
        backwards = [_backward_time(tensors) for tensors in (*([h] for h in ends), final)]
    return [f + b for f, b in zip(forwards, backwards, strict=True)]


def _backward_time(tensors: Sequence[Tensor]) -> float:
    wanted = [t for t in tensors if t.requires_grad]
    needed = leaves(wanted)
    start = time.perf_counter()
    if needed:
        torch.autograd.grad(wanted, needed, [torch.ones_like(t) for t in wanted])
    return time.perf_counter() - start


def leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The parameters and other leaves that these tensors depend on."""
    found: dict[int, Tensor] = {}
    for tensor in tensors:
        for node, _ in gradient_edges(tensor):
            variable = getattr(node, "variable", None)
            if variable is not None:
                found[id(variable)] = variable
    return list(found.values())


def balanced(times: Sequence[float], stages: int) -> tuple[int, ...]:
    """The numbers of the places (the first is 0) that divide segments of these times into stages
    whose slowest is as fast as it can be.

    Example:
        >>> from feedbackward.parallel.split import balanced
        >>> balanced([1.0, 1.0, 1.0, 3.0], stages=2)
        (2,)
    """
    # best[i]: of the divisions of the first i segments, the slowest stage and the places
    best: list[tuple[float, tuple[int, ...]]] = [
        (sum(times[:i]), ()) for i in range(len(times) + 1)
    ]
    for stage in range(1, stages):
        best = [
            min((max(best[k][0], sum(times[k:i])), (*best[k][1], k - 1)) for k in range(stage, i))
            if i > stage
            else (float("inf"), ())
            for i in range(len(times) + 1)
        ]
    return best[-1][1]
