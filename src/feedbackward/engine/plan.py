"""The plan: which parameters each segment of a cut network trains."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from feedbackward.activity import Site
from feedbackward.engine.autograd import BROADCAST, JOIN
from feedbackward.engine.cuts import Cuts
from feedbackward.engine.hooks import Observer, Tape
from feedbackward.model.autograd_graph import below, is_leaf, walk
from feedbackward.model.example import as_in_training, run_example
from feedbackward.model.values import tensors_in


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


def make_plan(cuts: Cuts, sites: Sequence[Site], example: Any, whole: bool = True) -> Plan:
    """Run the cut network once on the example and read from autograd's graph which parameters each segment holds.

    With `whole`, the plan is made as if every parameter trained. It then stays true when parameters are frozen or
    unfrozen later, and `Plan.among` restricts it to those that train. Without `whole` it covers what trains now.
    """
    model = cuts.model
    names = {id(p): name for name, p in model.named_parameters()}
    with (
        as_in_training(model, whole),
        cuts.recording() as tape,
    ):
        output = run_example(model, example)
    above = [t for t in [*tensors_in(output), *_top(tape)] if t.requires_grad]
    ends = [[h] if h is not None else [] for h in tape.h]
    nodes = [_nodes(tensors) for tensors in (*ends, above)]
    names_of_sites = [site.name for site in cuts.sites]
    # a site's module may be called "head" itself
    labels = [*names_of_sites, "the head" if "head" in names_of_sites else "head"]
    *segments, head = (
        Segment(label, _held(found, names)) for label, found in zip(labels, nodes, strict=True)
    )
    held = {name for segment in (*segments, head) for name in segment.parameters}
    unreached = tuple(
        name
        for name, p in model.named_parameters()
        if name not in held and (p.requires_grad or p.is_floating_point())
    )
    stages = (*segments, head) if cuts.sites else _uncut(model, sites, example, head, names)
    return Plan(
        tuple(segments), head, unreached, _overlaps(labels, nodes, names), stages, tuple(tape.order)
    )


def _top(tape: Tape) -> list[Tensor]:
    """The source that no cut lies above: the output may hide its tensors (a closure, an object of its own)."""
    top = tape.sources.get(str(tape.order[-1])) if tape.order else None
    return [] if top is None else [top]


def _uncut(
    model: nn.Module, sites: Sequence[Site], example: Any, head: Segment, names: dict[int, str]
) -> tuple[Segment, ...]:
    """The parts between the sites of a network without cuts.

    A parameter that several parts use belongs to the lowest of them.
    """
    observer = Observer(tuple(sites), ())
    handles = observer.install(model, prepend=True)
    try:
        with as_in_training(model), observer.recording() as tape:
            run_example(model, example)
    finally:
        for handle in handles:
            handle.remove()
    parts, seen = [], set[str]()
    for site, h in zip(sites, tape.h, strict=True):
        behind = parameters_behind([] if h is None else [h], names)
        parts.append(Segment(site.name, tuple(name for name in behind if name not in seen)))
        seen.update(behind)
    return (*parts, Segment(head.site, tuple(name for name in head.parameters if name not in seen)))


def _overlaps(
    labels: Sequence[str], nodes: Sequence[set[Any]], names: dict[int, str]
) -> dict[tuple[str, str], tuple[str, ...]]:
    """The pairs whose graphs share a computation. A parameter that both use (a leaf) does not count as one."""
    inner = [{node for node in found if not is_leaf(node)} for found in nodes]
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
    """All nodes of these tensors' autograd graphs. A parameter that is a site itself has a node too."""
    return _behind(get_gradient_edge(t).node for t in tensors if t.requires_grad)


def _behind(nodes: Iterable[Any]) -> set[Any]:
    """These nodes and all that they lead to."""
    return set(walk(nodes, _of_the_segment))


def _of_the_segment(node: Any) -> list[Any]:
    """What a broadcast feeds belongs to other segments: it leads on to its source only."""
    return below(node)[:1] if isinstance(node, (BROADCAST, JOIN)) else below(node)
