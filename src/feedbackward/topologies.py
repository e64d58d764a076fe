"""Feedback graphs in common use, for the `graph` method of a rule.

`star` feeds every site from one source, and `chain` feeds every layer from its own output.
`segments` and `relays` are between the two. `segments` are short chains, each of which begins with a
direct edge; in `relays` a few layers send on their error. In a `ladder` each site is fed from the site
above it. `modules` makes direct connections within groups of sites.

Example:
    >>> import torch
    >>> from torch import nn
    >>> import feedbackward as fb
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> learner = fb.attach(model, fb.DFA(), example=torch.randn(16, 4))
    >>> graph = fb.topologies.star(learner.sites, learner.source, fb.Dense())
    >>> graph == learner.graph
    True
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from feedbackward.activity import LayerInput, Site, Source
from feedbackward.errors import AttachError
from feedbackward.graph import Edge, Graph
from feedbackward.operators.base import Operator

__all__ = ["chain", "ladder", "modules", "relays", "segments", "star"]


def chain(
    layer_inputs: Sequence[Any],
    form: Callable[[LayerInput], Operator],
    shared: bool = False,
    with_forward_weight: bool = False,
) -> Graph:
    """Send the error of each layer's output to that layer's input.

    layer_inputs: sites of a rule with `feeds = LayerInput`.
    form: the operator for each of them.
    shared: whether `B` gets the gradient of `W`.
    with_forward_weight: whether the operator gets `W`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x = torch.randn(16, 4)
        >>> layers = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)]
        >>> model = nn.Sequential(*layers)
        >>> learner = fb.attach(model, fb.FA(), example=x)
        >>> shaped = fb.operators.LayerShaped
        >>> graph = fb.chain(learner.sites, lambda layer: shaped(layer.form))
        >>> [(edge.source.name, edge.site.name) for edge in graph.edges]
        [('2', '2.input'), ('4', '4.input')]
    """
    if not all(isinstance(layer_input, LayerInput) for layer_input in layer_inputs):
        raise AttachError(
            "a chain feeds the inputs of layers: set `feeds = LayerInput` in the rule's class."
        )
    edges = (
        Edge(
            layer_input.source,
            layer_input,
            form(layer_input),
            shares=layer_input.weight if shared else None,
            forward_weight=layer_input.weight if with_forward_weight else None,
        )
        for layer_input in layer_inputs
    )
    return Graph(tuple(layer_inputs), tuple(edges))


def relays(
    layer_inputs: Sequence[Any],
    steps: int,
    form: Callable[[Source, LayerInput], Operator],
    shared: bool = False,
) -> Graph:
    """Divide the layers into at most `steps` runs, and feed each run from the output of its last layer, the relay.

    The error of a relay comes from the run above it. The division is the one whose edges pass over the fewest layers in
    total, because feedback cannot follow what changes between a relay and a site. A layer that is larger than the relay
    counts more: one before a pool, or above the classes.

    layer_inputs: sites of a rule with `feeds = LayerInput`.
    form: the operator from a relay to a layer input.
    shared: whether the edge over the relay's own layer gets the gradient of that layer's weight.

    A relay that feeds more than one layer must be one that no other path bypasses. Raises AttachError if there are too few
    such relays.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x = torch.randn(16, 4)
        >>> layers = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)]
        >>> model = nn.Sequential(*layers)
        >>> learner = fb.attach(model, fb.FA(), example=x)
        >>> graph = fb.topologies.relays(learner.sites, 1, lambda relay, site: fb.Dense())
        >>> [(edge.source.name, edge.site.name) for edge in graph.edges]  # one step: the output feeds all
        [('4', '2.input'), ('4', '4.input')]
    """
    if not all(isinstance(layer_input, LayerInput) for layer_input in layer_inputs):
        raise AttachError(
            "relays feed the inputs of layers: set `feeds = LayerInput` in the rule's class."
        )
    runs = _runs(layer_inputs, steps)
    if runs is None:
        usable = [layer.source.name for layer in layer_inputs if layer.dominates] or "none"
        raise AttachError(
            f"no {steps} layers can relay the error: a relay must be a layer that no other path (a skip connection, a branch) "
            f"bypasses; here: {usable}. Allow more steps, or use direct "
            "feedback (DKP) or a rule of single layers (KolenPollack, WeightMirror)."
        )
    edges = [
        Edge(
            run[-1].source,
            layer_input,
            form(run[-1].source, layer_input),
            shares=layer_input.weight if shared and layer_input is run[-1] else None,
        )
        for run in runs
        for layer_input in run
    ]
    return Graph(tuple(layer_inputs), tuple(edges))


def _runs(layer_inputs: Sequence[LayerInput], steps: int) -> list[Sequence[LayerInput]] | None:
    """The cheapest division of the layer inputs into at most `steps` runs, the lowest run first; None if there is none."""
    none: list[Sequence[LayerInput]] = []
    best = [(0.0, none)] + [(math.inf, none)] * len(layer_inputs)
    for _ in range(steps):
        best = [
            min(
                [best[stop]]
                + [
                    (
                        best[i][0] + _passed_over(layer_inputs[i:stop]),
                        [*best[i][1], layer_inputs[i:stop]],
                    )
                    for i in range(stop)
                ],
                key=lambda cost_and_runs: cost_and_runs[0],
            )
            for stop in range(len(layer_inputs) + 1)
        ]
    cost, runs = best[-1]
    return runs if math.isfinite(cost) else None


def _passed_over(run: Sequence[LayerInput]) -> float:
    """How many layers lie between the sites of a run and its relay, in total.

    A layer that is larger than the relay counts more, by the binary logarithm of the ratio of sizes. The result is infinite
    if other paths bypass the relay.
    """
    if len(run) > 1 and not run[-1].dominates:
        return math.inf
    sizes = [math.prod(layer_input.source.shape) for layer_input in run]
    counts = [1 + max(0.0, math.log2(size / sizes[-1])) for size in sizes[:-1]]
    return sum(sum(counts[i:]) for i in range(len(counts)))


def segments(
    layer_inputs: Sequence[Any],
    source: Source,
    steps: int,
    operator: Operator,
    form: Callable[[LayerInput], Operator],
) -> Graph:
    """Divide the layers into chains of at most `steps` products, and feed the top of each directly.

    The highest segment begins at the source and is a :func:`chain`. The highest layer input of any other gets the source's error by
    one edge, and those below it that of their layer's output. A segment may begin only where everything below reaches the
    source through the layer before; where a segment would be too long without such a place, AttachError is raised.

    layer_inputs: sites of a rule with `feeds = LayerInput`.
    operator: of the direct edges.
    form: the operator of the edges within segments, which get the gradients of the layers' weights.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x = torch.randn(16, 4)
        >>> layers = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)]
        >>> model = nn.Sequential(*layers)
        >>> learner = fb.attach(model, fb.FA(), example=x)
        >>> shaped = fb.operators.LayerShaped
        >>> graph = fb.topologies.segments(
        ...     learner.sites, learner.source, 1, fb.Dense(), lambda layer: shaped(layer.form)
        ... )
        >>> [(edge.source.name, edge.site.name) for edge in graph.edges]  # one step: all are fed directly
        [('4', '2.input'), ('4', '4.input')]
    """
    entries = _entries(layer_inputs, steps)
    edges = [
        Edge(source, as_activity(edge.site), operator) if edge.site in entries else edge
        for edge in chain(layer_inputs, form, shared=True).edges
    ]
    return Graph(tuple(edge.site for edge in edges), tuple(edges))


def _entries(layer_inputs: Sequence[LayerInput], steps: int) -> list[LayerInput]:
    """The layer inputs that the source feeds directly: as few as may be, so as high as their segments let them."""
    entries: list[LayerInput] = []
    top = len(layer_inputs)  # the first above the segment that is made long now
    while top > steps:
        lowest = top - 1 - steps
        fit = [i for i in range(lowest, top - 1) if layer_inputs[i].dominates]
        if not fit:
            names = [layer_input.name for layer_input in layer_inputs[lowest:top]]
            raise AttachError(
                f"no segment of at most {steps} products can end within {', '.join(names)}: it may end only below a layer that no "
                "other path (a skip connection, a branch) bypasses. Allow more steps, or use HighwayKP for a net of skip paths."
            )
        entries.append(layer_inputs[fit[0]])
        top = fit[0] + 1
    return entries


def ladder(sites: Sequence[Site], source: Source, operator: Operator) -> Graph:
    """Send the source's error to the last site, the signal of that site to the site before it, and so on down.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x = torch.randn(16, 4)
        >>> layers = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)]
        >>> model = nn.Sequential(*layers)
        >>> learner = fb.attach(model, fb.DFA(), example=x)
        >>> graph = fb.topologies.ladder(learner.sites, learner.source, fb.Dense())
        >>> [(edge.source.name, edge.site.name) for edge in graph.edges]
        [('3', '1'), ('4', '3')]
    """
    sources = [*map(as_source, sites[1:]), source]
    edges = (Edge(above, site, operator) for above, site in zip(sources, sites, strict=True))
    return Graph(tuple(sites), tuple(edges))


def modules(
    groups: Sequence[Sequence[Site]], source: Source, form: Callable[[int], Operator]
) -> Graph:
    """Connect the output of each group of sites directly to the group's other sites.

    The output of the last group is the source. The output of another group is its last site. That site is not cut: its
    error comes from the group above, through the layers between them.

    groups: the sites, group by group, the lowest first.
    source: the source of the last group.
    form: `form(k)` is the operator of an edge to a site that lies k sites below the group's output.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x = torch.randn(16, 4)
        >>> layers = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)]
        >>> model = nn.Sequential(*layers)
        >>> learner = fb.attach(model, fb.DFA(), example=x)
        >>> first, second = learner.sites
        >>> graph = fb.topologies.modules([[first, second]], learner.source, lambda k: fb.Dense())
        >>> [(edge.source.name, edge.site.name) for edge in graph.edges]
        [('4', '1'), ('4', '3')]
    """
    outputs = [*(as_source(group[-1]) for group in groups[:-1]), source]
    edges = []
    for group, output in zip(groups, outputs, strict=True):
        inner = group if output is source else group[:-1]
        edges += [Edge(output, site, form(len(inner) - i)) for i, site in enumerate(inner)]
    return Graph(tuple(edge.site for edge in edges), tuple(edges))


def star(sites: Sequence[Site], source: Source, operator: Operator) -> Graph:
    """Send the error of one source directly to every site.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x = torch.randn(16, 4)
        >>> layers = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)]
        >>> model = nn.Sequential(*layers)
        >>> learner = fb.attach(model, fb.DFA(), example=x)
        >>> graph = fb.star(learner.sites, learner.source, fb.Dense())
        >>> [(edge.source.name, edge.site.name) for edge in graph.edges]
        [('4', '1'), ('4', '3')]
    """
    return Graph(tuple(sites), tuple(Edge(source, site, operator) for site in sites))


def as_source(site: Site) -> Source:
    return Source(site.name, site.points, site.shape, site.tokens, site.unflattened)


def as_activity(site: Site) -> Site:
    """A layer's input as the activity that it is: cut for all that use it, so that what is below waits for nothing above."""
    return Site(site.name, site.points, site.shape, site.tokens, site.unflattened, site.apart)
