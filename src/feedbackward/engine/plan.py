"""What a learner will train, and how: the table that `print(learner)` shows."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from feedbackward.engine.autograd import BROADCAST, JOIN
from feedbackward.engine.hooks import Observer
from feedbackward.engine.weights import count_bytes
from feedbackward.graph import LayerInput
from feedbackward.model.example import as_in_training, run_example
from feedbackward.model.values import tensors_in

if TYPE_CHECKING:
    from feedbackward.learner import Learner


_SELF_EVIDENT = ("Dense", "LayerShaped")  # operators whose weights' shape says what they are


@dataclass(frozen=True)
class Segment:
    """The part of the network below one site and above the cuts before it (or the head, above all cuts)."""

    site: str
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """Segments in forward order, the head last, and what is irregular about them."""

    segments: tuple[Segment, ...]
    head: Segment
    # trainable parameters that no segment holds
    unreached: tuple[str, ...]
    # pairs of segments that have some of their computation in common, and the parameters behind it
    overlaps: Mapping[tuple[str, str], tuple[str, ...]]
    # segments and head; of a network without cuts what lies between the sites
    stages: tuple[Segment, ...]
    # sites by number, sources by name, as the forward pass reaches them
    order: tuple[int | str, ...]

    def among(self, trainable: Collection[str]) -> Plan:
        """The plan while only these parameters train."""

        def kept(names: Iterable[str]) -> tuple[str, ...]:
            return tuple(name for name in names if name in trainable)

        def part(segment: Segment) -> Segment:
            return Segment(segment.site, kept(segment.parameters))

        return Plan(
            tuple(map(part, self.segments)),
            part(self.head),
            kept(self.unreached),
            {pair: kept(names) for pair, names in self.overlaps.items() if kept(names)},
            tuple(map(part, self.stages)),
            self.order,
        )

    def renamed(self, model: nn.Module) -> Plan:
        """The plan of the model as it is by now, with other names of parameters or with weights that are tied.

        A new one belongs to the segments of those that its module had, or a module around it: where no
        site lies within, what is in a module leads to the same sites.
        """
        names = {id(p): name for name, p in model.named_parameters()}
        tied = {n: names[id(p)] for n, p in model.named_parameters(remove_duplicate=False)}
        holders = (*self.segments, self.head, Segment("", self.unreached))
        known = {name for segment in holders for name in segment.parameters}
        heirs = {name: _nearest(name, known) for name in tied if name not in known}

        def kept(held: Iterable[str]) -> tuple[str, ...]:
            there = set(held)
            found = {own for n, own in tied.items() if n in there or heirs.get(n, set()) & there}
            return tuple(n for n in tied if n in found)

        def part(segment: Segment) -> Segment:
            return Segment(segment.site, kept(segment.parameters))

        lost = [name for name, near in heirs.items() if not near and tied[name] == name]
        return Plan(
            tuple(map(part, self.segments)),
            part(self.head),
            (*kept(self.unreached), *lost),
            {pair: kept(held) for pair, held in self.overlaps.items()},
            tuple(map(part, self.stages)),
            self.order,
        )

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources' names in the order in which the forward pass reaches them."""
        return tuple(name for name in self.order if isinstance(name, str))

    @property
    def shared(self) -> dict[str, tuple[str, ...]]:
        """Parameters that belong to several segments and receive the sum of their gradients."""
        holders: dict[str, list[str]] = {}
        for segment in (*self.segments, self.head):
            for name in segment.parameters:
                holders.setdefault(name, []).append(segment.site)
        return {name: tuple(sites) for name, sites in holders.items() if len(sites) > 1}


def _nearest(name: str, known: set[str]) -> set[str]:
    """Those of the known names that are in the smallest module around the name which has any; none in the model itself."""
    owner = name.rpartition(".")[0]
    while owner:
        near = {other for other in known if other.startswith(f"{owner}.")}
        if near:
            return near
        owner = owner.rpartition(".")[0]
    return set()


def make_plan(learner: Learner, example: Any, whole: bool = True) -> Plan:
    """Run the cut network once on the example and read from autograd's graph which parameters each segment holds.

    With `whole`, the plan is made as if every parameter trained. It then stays true when parameters are frozen or
    unfrozen later, and `Plan.among` restricts it to those that train. Without `whole` it covers what trains now.
    """
    names = {id(p): name for name, p in learner.model.named_parameters()}
    model = learner.model
    with (
        as_in_training(model, whole),
        learner.cuts.recording() as tape,
    ):
        output = run_example(model, example)
    above = [t for t in tensors_in(output) if t.requires_grad]
    ends = [[h] if h is not None else [] for h in tape.h]
    nodes = [_nodes(tensors) for tensors in (*ends, above)]
    names_of_sites = [site.name for site in learner.cuts.sites]
    # a site's module may be called "head" itself
    labels = [*names_of_sites, "the head" if "head" in names_of_sites else "head"]
    *segments, head = (
        Segment(label, _held(found, names)) for label, found in zip(labels, nodes, strict=True)
    )
    held = {name for segment in (*segments, head) for name in segment.parameters}
    unreached = tuple(
        name
        for name, p in learner.model.named_parameters()
        if name not in held and (p.requires_grad or p.is_floating_point())
    )
    stages = (*segments, head) if learner.graph.sites else _uncut(learner, example, head, names)
    return Plan(
        tuple(segments), head, unreached, _overlaps(labels, nodes, names), stages, tuple(tape.order)
    )


def _uncut(
    learner: Learner, example: Any, head: Segment, names: dict[int, str]
) -> tuple[Segment, ...]:
    """The parts between the sites of a network without cuts.

    A parameter that several parts use belongs to the lowest of them.
    """
    observer, model = Observer(learner.sites, ()), learner.model
    handles = observer.install(model, prepend=True)
    try:
        with as_in_training(model), observer.recording() as tape:
            run_example(model, example)
    finally:
        for handle in handles:
            handle.remove()
    parts, seen = [], set[str]()
    for site, h in zip(learner.sites, tape.h, strict=True):
        behind = parameters_behind([] if h is None else [h], names)
        parts.append(Segment(site.name, tuple(name for name in behind if name not in seen)))
        seen.update(behind)
    return (*parts, Segment(head.site, tuple(name for name in head.parameters if name not in seen)))


def _overlaps(
    labels: Sequence[str], nodes: Sequence[set[Any]], names: dict[int, str]
) -> dict[tuple[str, str], tuple[str, ...]]:
    """The pairs whose graphs share a computation. A parameter that both use (a leaf) does not count as one."""
    inner = [{node for node in found if not hasattr(node, "variable")} for found in nodes]
    found = {}
    for i, j in itertools.combinations(range(len(labels)), 2):
        if not inner[i].isdisjoint(inner[j]):
            found[labels[i], labels[j]] = _held(_behind(inner[i] & inner[j]), names)
    return found


def parameters_behind(tensors: Iterable[Tensor], names: dict[int, str]) -> tuple[str, ...]:
    """The names of the parameters that these tensors' autograd graphs lead to."""
    return _held(_nodes(tensors), names)


def _held(nodes: set[Any], names: dict[int, str]) -> tuple[str, ...]:
    """The names of the parameters whose gradients these autograd nodes accumulate."""
    found = {names.get(id(getattr(node, "variable", None))) for node in nodes}
    return tuple(name for name in names.values() if name in found)


def _nodes(tensors: Iterable[Tensor]) -> set[Any]:
    """All nodes of these tensors' autograd graphs."""
    return _behind(t.grad_fn for t in tensors)


def _behind(nodes: Iterable[Any]) -> set[Any]:
    """These nodes, and all that they lead to.

    The walk goes on from a broadcast to its source only, because the sites that it feeds belong to other segments.
    """
    seen: set[Any] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        parents = [parent for parent, _ in node.next_functions]
        stack += parents[:1] if isinstance(node, (BROADCAST, JOIN)) else parents
    return seen


def describe(learner: Learner) -> str:
    """The plan as text: a row per site, then the head, then whatever is irregular."""
    plan = learner.plan
    edges = {edge.site: edge for edge in learner.graph.edges}
    local = {end.site: end for end in learner.graph.local}
    lifted = {upward_edge.above: upward_edge.below.name for upward_edge in learner.graph.upward}
    rows = [("site", "activity", "feedback", "bytes", "trains")]
    for site, segment in zip(learner.graph.sites, plan.segments, strict=True):
        edge = edges.get(site)
        form, held = "none: frozen", tuple[Tensor, ...]()
        if edge:
            held = learner.weights_of(edge)
            form = (
                " + ".join(_size(w.shape) for w in held)
                or f"made from {edge.forward_weight or 'the seed'}:"
            )
            kind = type(edge.operator).__name__
            form += "" if kind in _SELF_EVIDENT else f" {kind}"
        elif site in local:
            auxiliary = learner.feedback.get_submodule(local[site].key)
            form, held = "a loss of its own", (*auxiliary.parameters(), *auxiliary.buffers())
        elif site in lifted:
            form = f"up from {lifted[site]}"
        size = in_bytes(count_bytes(held)) if edge or site in local else ""
        rows.append((site.name, _size(site.shape), form, size, _list(segment.parameters)))
    rows.append((plan.head.site, "", "true gradient", "", _list(plan.head.parameters)))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]]).rstrip()
        for row in rows
    ]
    title = (
        f"{learner.rule} on {type(learner.model).__name__}: {len(learner.graph.sites)} sites, "
        f"error of {learner.source.name!r}, feedback {in_bytes(learner.feedback_bytes)}"
    )
    # in a chain skip paths stay whole, so it is normal that parameters are in several segments
    shared = {} if issubclass(learner.rule.feeds, LayerInput) else plan.shared
    notes = [
        f"in several segments (gradients add up): {n} in {', '.join(s)}" for n, s in shared.items()
    ]
    notes += [f"not trained, no segment reaches it: {name}" for name in plan.unreached]
    return "\n".join([title, *("  " + line for line in lines), *("  " + note for note in notes)])


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _list(names: Sequence[str]) -> str:
    return (
        ", ".join(names)
        if len(names) <= 4
        else f"{', '.join(names[:3])}, ... ({len(names)} tensors)"
    )


def in_bytes(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
