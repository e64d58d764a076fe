"""The division of a learner: who holds which part. Every rank computes the same one, on the whole
model, and checks it before the parts of other ranks are dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from feedbackward.activity import LayerInput
from feedbackward.engine.target import Target
from feedbackward.engine.weights import weight_names
from feedbackward.errors import AttachError
from feedbackward.learner import Learner
from feedbackward.model.state import all_trainable, preserved, training_mode
from feedbackward.model.values import tensors_in
from feedbackward.parallel.recording import Recording
from feedbackward.parallel.routes import Routes, stage_of
from feedbackward.parallel.segment import Forward, StageModule
from feedbackward.parallel.split import cut_points, leaves


@dataclass(frozen=True)
class Division:
    """Attributes:
    recording: what the example showed. cut: the places of the division, by number.
    routes: what travels. parts: by stage, the names of the parameters that it trains.
    holders: of every key of the learner's state_dict, the stage that holds it.
    """

    recording: Recording
    cut: tuple[int, ...]
    routes: Routes
    parts: tuple[tuple[str, ...], ...]
    holders: dict[str, int]

    @property
    def stages(self) -> int:
        return len(self.cut) + 1

    def bounds(self, stage: int) -> tuple[int | None, int | None]:
        """The places below and above a stage; None for the model's input and output."""
        lower = self.cut[stage - 1] if stage else None
        return lower, self.cut[stage] if stage < len(self.cut) else None


def divide(learner: Learner, recording: Recording, cut: tuple[int, ...], example: Any) -> Division:
    """Divide the learner at these places, and check that the stages in turn give what the model
    gives, bit for bit.

    Raises AttachError where they do not, and where stages would train one parameter.
    """
    many = learner.graph.repeated
    if many:
        raise AttachError(
            f"the calls of {many[0].name!r} are one site, which cannot be divided over processes: choose sites that are called once."
        )
    routes = _routes(learner, recording, cut)
    empty = Division(recording, cut, routes, (), {})
    parts = _trial(learner, empty, example)
    _refuse_tied(learner, parts)
    _refuse_untrained(learner, parts)
    _refuse_distant(learner, routes, parts)
    holders = _holders(learner, empty, parts)
    return Division(recording, cut, routes, parts, holders)


def _routes(learner: Learner, recording: Recording, cut: tuple[int, ...]) -> Routes:
    graph = learner.graph
    cut_at = [recording.places[index].points for index in cut]
    boundary_times = [recording.clock[index] for index in cut]
    times = _times(learner, recording)
    sites = {s.name: stage_of(times[s.points], boundary_times) for s in graph.sites}
    sources = {s.name: stage_of(times[s.points], boundary_times) for s in graph.sources}
    uncut = tuple(points not in cut_points(learner) for points in cut_at)
    return Routes(graph, sites, sources, (*uncut, False), learner.attached.needs_error)


def _times(learner: Learner, recording: Recording) -> dict[Any, float]:
    """When the sites and sources of the graph were there, by their points."""
    calls: dict[str, list[Any]] = {}
    for call in recording.calls:
        calls.setdefault(call.name, []).append(call)
    at_place = {p.points: t for p, t in zip(recording.places, recording.clock, strict=True)}
    found: dict[Any, float] = {}
    for activity in (*learner.graph.sites, *learner.graph.sources):
        point = activity.points[0]
        call = calls[point.module][point.call]
        time = call.end if point.kind == "output" else call.start
        # a layer's own input lies above the place where the activity is, which others may use too
        own = isinstance(activity, LayerInput)
        found[activity.points] = time if own else at_place.get(activity.points, time)
    return found


def _trial(learner: Learner, division: Division, example: Any) -> tuple[tuple[str, ...], ...]:
    """Run the stages in turn on the example; the names of what each trains."""
    names = {id(p): name for name, p in learner.named_parameters()}
    rows = division.recording.rows
    trained = []
    target = _some_target(learner, rows)
    whole = Division(division.recording, (), _routes(learner, division.recording, ()), (), {})
    with training_mode(learner.model), all_trainable(learner.model), torch.enable_grad():
        expected = _pass(learner, whole, 0, example, None, target).output
        received = None
        for stage in range(division.stages):
            forward = _pass(learner, division, stage, example, received, target)
            tensors = [root.tensor for root in forward.roots]
            if stage == division.stages - 1:
                tensors += [t for t in tensors_in(forward.output) if t.requires_grad]
                _compare(learner, division, expected, forward.output)
            else:
                received = forward.output
            found = {names[id(p)] for p in leaves(tensors) if id(p) in names}
            trained.append(tuple(name for name in names.values() if name in found))
    return tuple(trained)


def _pass(
    learner: Learner,
    division: Division,
    stage: int,
    example: Any,
    received: Tensor | None,
    target: Target | None,
) -> Forward:
    if received is not None:
        received = received.detach().requires_grad_(division.routes.uncut[stage - 1])
    bounds = division.bounds(stage)
    module = StageModule(learner, division.recording, bounds, division.routes, stage)
    try:
        with preserved(learner.model), preserved(learner.feedback):
            return module(example, division.recording.rows, received, target)
    finally:
        module.remove()


def _some_target(learner: Learner, rows: int) -> Target | None:
    """Targets for the trial of a rule that needs them: the first class everywhere."""
    if not learner.attached.needs_target:
        return None
    shape = learner.source.shape
    kept = shape[: learner.source.tokens] if learner.source.tokens else shape[1:]
    device = next(learner.model.parameters()).device
    return Target(torch.zeros((rows, *kept), dtype=torch.long, device=device))


def _compare(learner: Learner, division: Division, expected: Any, found: Any) -> None:
    pairs = list(zip(tensors_in(expected), tensors_in(found), strict=True))
    if all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs):
        return
    names = [division.recording.places[index].name for index in division.cut]
    raise AttachError(
        f"{type(learner.model).__name__} divided at {', '.join(names)} does not give what it gives as a whole: a second "
        "activity crosses a boundary (a skip connection, a cache, a tensor that a module keeps). Choose other places with `cut=`."
    )


def _refuse_tied(learner: Learner, parts: Sequence[Sequence[str]]) -> None:
    """A parameter that two stages train would become two."""
    holders: dict[str, list[int]] = {}
    for stage, part in enumerate(parts):
        for name in part:
            holders.setdefault(name, []).append(stage)
    parameters = dict(learner.named_parameters(remove_duplicate=False))
    for name, stages in holders.items():
        p = parameters[name]
        if len(stages) > 1 and p.requires_grad:
            uses = [other for other, q in parameters.items() if q is p]
            also = f" (tied: {' and '.join(uses)})" if len(uses) > 1 else ""
            raise AttachError(
                f"stages {stages} would both train {name!r}{also}, and each would have a copy of its own. Choose a `cut=` "
                "with all its uses in one stage, freeze it, or use weights of their own."
            )


def _refuse_untrained(learner: Learner, parts: Sequence[Sequence[str]]) -> None:
    """What the whole learner trains, some stage must train."""
    fed = {edge.site.name for edge in learner.graph.edges}
    fed |= {end.site.name for end in learner.graph.local}
    whole = learner.attached.whole_plan
    segments = [segment for segment in whole.segments if segment.site in fed]
    trained = {name for part in parts for name in part}
    for segment in (*segments, whole.head):
        for name in segment.parameters:
            if f"model.{name}" not in trained:
                raise AttachError(
                    f"no stage would train {name!r}, of the segment of {segment.site!r}: choose other places with `cut=`."
                )


def _refuse_distant(learner: Learner, routes: Routes, parts: Sequence[Sequence[str]]) -> None:
    """Feedback that is made from a weight, or learns with it, must be in the stage of the weight."""
    for edge in routes.graph.edges:
        stage = routes.site_stage[edge.site.name]
        for name in filter(None, (edge.shares, edge.forward_weight)):
            if f"model.{name}" not in parts[stage]:
                raise AttachError(
                    f"{learner.rule.label} cannot be divided here: the feedback of {edge.site.name!r}, in stage {stage}, needs "
                    f"{name!r} of another stage. Choose a `cut=` that leaves both in one, or use KolenPollack or DKP."
                )


def _holders(
    learner: Learner, division: Division, parts: Sequence[Sequence[str]]
) -> dict[str, int]:
    """The stage that holds each tensor of the learner's state: where it trains, else where its
    module runs."""
    graph, stages = division.routes.graph, range(division.stages)
    stage_of_part = {name: stage for stage in reversed(stages) for name in parts[stage]}
    running = [division.recording.running(*division.bounds(stage)) for stage in stages]
    feedback = {
        f"feedback.{name}": division.routes.site_stage[edge.site.name]
        for edge in graph.edges
        for name in weight_names(edge)
    }
    local = {
        f"feedback.{end.key}.": division.routes.site_stage[end.site.name] for end in graph.local
    }
    found = {}
    for key in learner.state_dict():
        holder = stage_of_part.get(key, feedback.get(key))
        if holder is None:
            holder = next((stage for start, stage in local.items() if key.startswith(start)), None)
        if holder is None:
            module = division.recording.called(key.removeprefix("model.").rpartition(".")[0])
            holder = next((s for s in stages if module in running[s]), 0)
        found[key] = holder
    return found


def drop_others(learner: Learner, division: Division, stage: int) -> None:
    """Let go of the memory of all that other stages hold: their tensors become meta tensors."""
    running = division.recording.running(*division.bounds(stage))
    own = set(division.parts[stage])
    for name, module in learner.model.named_modules():
        if division.recording.called(name) not in running:
            _drop(module, {key.rpartition(".")[2] for key in own if _inside(key, name)})
    edges = [e for e in division.routes.graph.edges if _site(division, e) == stage]
    kept = {name for edge in edges for name in weight_names(edge)}
    _drop(learner.feedback, kept)
    for end in division.routes.graph.local:
        if _site(division, end) != stage:
            for module in learner.feedback.get_submodule(end.key).modules():
                _drop(module, set())


def _site(division: Division, end: Any) -> int:
    return division.routes.site_stage[end.site.name]


def _inside(key: str, module: str) -> bool:
    return key.rpartition(".")[0] == (f"model.{module}" if module else "model")


def _drop(module: nn.Module, kept: set[str]) -> None:
    for name, p in module._parameters.items():
        if p is not None and name not in kept:
            module._parameters[name] = nn.Parameter(p.detach().to("meta"), p.requires_grad)
    for name, b in module._buffers.items():
        if b is not None and name not in kept:
            module._buffers[name] = b.to("meta")


def count_rows(inputs: Any) -> int:
    """The size of a batch: the first dimension of its first tensor."""
    return next(len(t) for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.dim())
