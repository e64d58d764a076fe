"""The feedback graph: which activities are cut, and which edges carry the error to them.

Legend used throughout: N batch, T tokens, C units of the source (classes), n features of a site.
A *site* is an activity `h` at which the network is cut; a *source* is an activity whose error
`d = dLoss/dsource` becomes known during backward; an *edge* sends `d` to a site through feedback weights `B`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from feedbackward.errors import AttachError
from feedbackward.operators.base import Operator
from feedbackward.operators.layer import LayerForm


@dataclass(frozen=True)
class HookPoint:
    """A place in the forward pass: the input or the output of one call of one module.

    `leaf` counts the tensors of a structured output (tuple, dict, ModelOutput); None for a plain tensor.
    """

    module: str
    kind: str  # "input" | "output"
    call: int = 0
    leaf: int | None = None


@dataclass(frozen=True)
class Activity:
    """A tensor of the forward pass: its name, where it is tapped, and its shape without the batch.

    `tokens` is how many of the leading dimensions of `shape` are token dimensions (0 unless the layer
    that produced it works on the last dimension only).
    """

    name: str
    points: tuple[HookPoint, ...]
    shape: tuple[int, ...]
    tokens: int = 0


class Site(Activity):
    """An activity at which the network is cut: everything above sees it detached."""


class Source(Activity):
    """An activity whose error is sent to sites."""


@dataclass(frozen=True)
class PreActivation(Site):
    """A layer's output, of which the next layer sees an elementwise function and nothing else.

    `activation` is that function, the identity where there is none.
    """

    activation: Callable[[Tensor], Tensor] = field(kw_only=True, compare=False)


@dataclass(frozen=True)
class LayerInput(Site):
    """The input of one layer as that layer alone sees it: other users of the same tensor, such as a skip path, stay
    connected. It is fed from the layer's own output, by weights of the layer's own form.

    `weight` is the name of the layer's weight in the model. `below` is the output of the layer before, where nothing but
    an elementwise activation lies between; else what does, in words. `dominates`: whether all that lies below reaches the
    source of the rule's error through this layer's output and no other way.
    """

    source: Source = field(kw_only=True)
    form: LayerForm = field(kw_only=True)
    weight: str = field(kw_only=True)
    below: PreActivation | str = field(kw_only=True)
    dominates: bool = field(kw_only=True)


@dataclass(frozen=True)
class Edge:
    """A feedback connection from a source to a site, with weights `B` of the operator's form.

    `shares` names a weight of the model whose gradient `B` gets as well, instead of one of its own. `forward_weight` names a
    weight of the model which the operator is given, as it is in the forward pass, as the last of the edge's weights
    (sign-symmetry uses its signs); it gets no gradient from the feedback.
    """

    source: Source
    site: Site
    operator: Operator
    shares: str | None = None
    forward_weight: str | None = None
    key: str = ""

    def __post_init__(self) -> None:
        if not self.key:
            key = feedback_key(self.site)
            if self.operator.common:
                key = f"{type(self.operator).__name__}/{'x'.join(map(str, self.source_shape))}"
            object.__setattr__(self, "key", key)

    @property
    def leading(self) -> int:
        """Leading dimensions kept by the edge: the batch, and the tokens where both ends are token-wise."""
        source, site = self.source, self.site
        kept = source.tokens
        if kept and kept == site.tokens and source.shape[:kept] == site.shape[:kept]:
            return 1 + kept
        return 1

    @property
    def source_shape(self) -> tuple[int, ...]:
        """The source's feature dimensions."""
        return self.source.shape[self.leading - 1 :]

    @property
    def source_size(self) -> int:
        """C: the number of the source's features."""
        return math.prod(self.source_shape)

    @property
    def site_shape(self) -> tuple[int, ...]:
        """The site's feature dimensions."""
        return self.site.shape[self.leading - 1 :]


def feedback_key(site: Site) -> str:
    """The name under which the feedback of a site is kept: a module's name may not hold a dot."""
    return site.name.replace(".", "/")


@dataclass(frozen=True)
class Local:
    """A loss of its own for a site, from an auxiliary network; its gradient joins the backward pass at the source."""

    source: Source
    site: Site

    @property
    def key(self) -> str:
        return feedback_key(self.site)


@dataclass(frozen=True)
class UpwardEdge:
    """What a site is sent goes on upwards, through the layers between, to the next site (see `upward.response`)."""

    below: Site
    above: Site


@dataclass(frozen=True)
class Graph:
    """Where the network is cut, what is sent where, and which sites have a local loss. Sites with neither an edge nor a
    local loss, and to which nothing is lifted, get no signal."""

    sites: tuple[Site, ...] = ()
    edges: tuple[Edge, ...] = ()
    local: tuple[Local, ...] = ()
    upward: tuple[UpwardEdge, ...] = ()

    def __post_init__(self) -> None:
        keys = [edge.key for edge in self.edges if not edge.operator.common]
        fed = [end.site for end in self._ends]
        if len(set(keys)) < len(keys) or any(site not in self.sites for site in fed):
            raise AttachError(
                "a feedback graph needs a key of its own for every edge (unless its operator is common to several), and its "
                "edges and local losses must lead to its sites."
            )

    @property
    def _ends(self) -> list[Edge | Local]:
        return [*self.edges, *self.local]

    @property
    def sources(self) -> tuple[Source, ...]:
        return tuple(dict.fromkeys(end.source for end in self._ends))


def chain(
    layer_inputs: Sequence[Any],
    form: Callable[[LayerInput], Operator],
    shared: bool = False,
    with_forward_weight: bool = False,
) -> Graph:
    """The error of each layer's output is sent to that layer's input; with `shared`, `B` gets the gradient of `W`;
    with `with_forward_weight`, the operator is given `W`."""
    if not all(isinstance(layer_input, LayerInput) for layer_input in layer_inputs):
        raise AttachError(
            "a chain runs over layer_inputs: set `feeds = LayerInput` in the rule's class."
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
    """The layer_inputs in at most `steps` runs, each fed from the output of its last layer, whose error the run above gives;
    with `shared`, the edge over that layer alone gets the gradient of its weight.

    The runs are those whose edges pass over the fewest layers in sum: what lies between a relay and a site is what a constant
    map cannot follow. A layer that is larger than the relay, before a pooling or above the classes, counts more (`_passed_over`).

    A relay that feeds more than its own layer's input is one that no other path leads round. Raises AttachError where such
    relays do not suffice.
    """
    if not all(isinstance(layer_input, LayerInput) for layer_input in layer_inputs):
        raise AttachError(
            "relays run over layer_inputs: set `feeds = LayerInput` in the rule's class."
        )
    runs = _runs(layer_inputs, steps)
    if runs is None:
        usable = [layer.source.name for layer in layer_inputs if layer.dominates] or "none here"
        raise AttachError(
            f"no {steps} layers can relay the error: a relay must be a layer that no other path (a skip connection, a branch) leads "
            f"round, which are {usable}. Allow more steps, or use direct "
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
    """The cheapest partition of the layer_inputs into at most `steps` runs, the lowest first; None where there is none."""
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
    """The layers that lie between the sites of a run and its relay; none between the relay and its own input. One that is larger
    than the relay counts more, by the binary logarithm of how much larger. Infinite where other paths lead round the relay."""
    if len(run) > 1 and not run[-1].dominates:
        return math.inf
    sizes = [math.prod(layer_input.source.shape) for layer_input in run]
    counts = [1 + max(0.0, math.log2(size / sizes[-1])) for size in sizes[:-1]]
    return sum(sum(counts[i:]) for i in range(len(counts)))


def ladder(sites: Sequence[Site], source: Source, operator: Operator) -> Graph:
    """The source's error is sent to the last site, what that gets to the site before, and so on down."""
    sources = [*map(_as_source, sites[1:]), source]
    edges = (Edge(above, site, operator) for above, site in zip(sources, sites, strict=True))
    return Graph(tuple(sites), tuple(edges))


def modules(
    groups: Sequence[Sequence[Site]], source: Source, form: Callable[[int], Operator]
) -> Graph:
    """Direct connections within each group of sites, from its output: that of the last group is the source, that of the
    others is their last site, which is not cut: its error comes from the group above, through the layers between.

    `form(k)` is the operator of an edge from a group's output to a site k sites below it.
    """
    outputs = [*(_as_source(group[-1]) for group in groups[:-1]), source]
    edges = []
    for group, output in zip(groups, outputs, strict=True):
        inner = group if output is source else group[:-1]
        edges += [Edge(output, site, form(len(inner) - i)) for i, site in enumerate(inner)]
    return Graph(tuple(edge.site for edge in edges), tuple(edges))


def star(sites: Sequence[Site], source: Source, operator: Operator) -> Graph:
    """The error of one source is sent directly to every site."""
    return Graph(tuple(sites), tuple(Edge(source, site, operator) for site in sites))


def _as_source(site: Site) -> Source:
    return Source(site.name, site.points, site.shape, site.tokens)
