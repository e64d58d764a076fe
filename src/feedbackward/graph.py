"""The feedback graph: which activities are cut, and which edges carry the error to them.

Legend used throughout: N batch, T tokens, C units of the source (classes), n features of a site.
A *site* is an activity `h` at which the network is cut; a *source* is an activity whose error
`d = dLoss/dsource` becomes known during backward; an *edge* sends `d` to a site through feedback weights `B`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from feedbackward.activity import Site, Source
from feedbackward.errors import AttachError
from feedbackward.operators.base import Operator

if TYPE_CHECKING:
    from feedbackward.rule import Rule


@dataclass(frozen=True)
class Edge:
    """A feedback connection from a source to a site, with weights `B` of the operator's form.

    shares: the name of a weight of the model. `B` gets the gradient of that weight instead of one of its own.
    forward_weight: the name of a weight of the model. The operator gets it as the last of the edge's weights, as it is in
        the forward pass (sign-symmetry uses its signs). The feedback gives it no gradient.
    key: the name of the edge's weights in `learner.feedback`.
    factor: multiplies the signal.
    rule: what is sent and how `B` learns. `Rule.connect` sets it.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.DFA(), example=x)
        >>> edge = learner.graph.edges[0]
        >>> edge.source.name, edge.site.name, edge.operator
        ('2', '1', Dense(init='kaiming_uniform', scale=1.0))
        >>> tuple(learner.feedback_of(edge).shape)
        (3, 8)
    """

    source: Source
    site: Site
    operator: Operator
    shares: str | None = None
    forward_weight: str | None = None
    key: str = ""
    factor: float = 1.0
    rule: Rule = field(default=None, compare=False, repr=False)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        # what is asked for in every pass, and is the same in all
        object.__setattr__(self, "_repeats", self._find_repeats())
        object.__setattr__(self, "_leading", self._find_leading())
        if not self.key:
            key = feedback_key(self.site)
            if self.operator.common:
                key = f"{type(self.operator).__name__}/{'x'.join(map(str, self.source_shape))}"
            object.__setattr__(self, "key", key)
        names = [
            f"{self.key}:{part}" if i else self.key for i, part in enumerate(self.operator.parts)
        ]
        object.__setattr__(self, "_names", tuple(names))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its tensors among the feedback weights: the first is the edge's key."""
        return self._names  # type: ignore[attr-defined]

    @property
    def learns_in_pass(self) -> bool:
        """Whether `B` gets its gradient from the rule's `feedback_grad`, in every backward pass."""
        return self.rule.learned and self.shares is None and not self.rule.in_phase

    @property
    def leading(self) -> int:
        """Leading dimensions of the source kept by the edge: the batch, and the tokens where both ends are token-wise."""
        return self._leading  # type: ignore[attr-defined]

    def _find_leading(self) -> int:
        source, site = self.source, self.site
        kept, calls = source.tokens, self.repeats
        if (
            kept
            and kept == site.tokens - calls
            and source.shape[:kept] == site.shape[calls:][:kept]
        ):
            return 1 + kept
        return 1

    @property
    def repeats(self) -> int:
        """1 where every call of the site's module, or every token of a site that is apart, gets the same error; else 0.

        The source has then no step for each of them, or steps that are others. The site has one leading dimension more than what is
        sent: the calls or the tokens, behind the batch.
        """
        return self._repeats  # type: ignore[attr-defined]

    def _find_repeats(self) -> int:
        source, site = self.source, self.site
        kept = site.tokens
        stepped = kept == source.tokens and site.shape[:kept] == source.shape[:kept]
        return int(site.apart or (site.every and not stepped))

    @property
    def summed(self) -> int:
        """How many dimensions of the source, behind the batch, are summed over: the tokens, where the site's are others."""
        return self.source.tokens if self.site.apart else 0

    @property
    def source_shape(self) -> tuple[int, ...]:
        """The source's feature dimensions."""
        return self.source.shape[self.leading - 1 + self.summed :]

    @property
    def source_size(self) -> int:
        """C: the number of the source's features."""
        return math.prod(self.source_shape)

    @property
    def site_shape(self) -> tuple[int, ...]:
        """The site's feature dimensions."""
        return self.site.shape[self.leading - 1 + self.repeats :]


_ESCAPED = str.maketrans({".": "/", "/": "%2F", ":": "%3A", "%": "%25"})


def feedback_key(site: Site) -> str:
    """The name under which the feedback of a site is kept.

    The name of a buffer may not hold a dot, so a slash replaces it. Slashes and colons are escaped, so that no two sites
    have the same key.
    """
    return site.name.translate(_ESCAPED)


@dataclass(frozen=True)
class Local:
    """A local loss for a site, from an auxiliary network. Its backward pass starts with that of the source.

    `network()` makes the auxiliary network; `loss(output, target)` is the loss of its output, with the target as
    `learner.target` got it. `above`: the site, if any, whose auxiliary network this one reads: its local loss comes first in
    the graph, and `network(that network)` makes this one. `reads`: a site of the graph, if any, that comes before, whose activity
    the auxiliary network gets as well, detached: `A(h, that)`. `rule`: the rule that the site belongs to; `Rule.connect` sets it.
    """

    source: Source
    site: Site
    network: Callable[..., nn.Module] = field(compare=False, repr=False)
    loss: Callable[[Any, Tensor], Tensor] = field(compare=False, repr=False)
    above: Site | None = None
    reads: Site | None = None
    rule: Rule = field(default=None, compare=False, repr=False)  # type: ignore[assignment]

    @property
    def key(self) -> str:
        return feedback_key(self.site)


@dataclass(frozen=True)
class UpwardEdge:
    """The signal of a site goes on upwards to the next site, through the layers between them (IFA)."""

    below: Site
    above: Site


@dataclass(frozen=True)
class Branches:
    """The residual branches that an error passes at most `sweeps` of, on any path.

    Their `inputs`, as the branches alone see them, are not cut. Before gradients are computed, the error of `source` is sent
    down `sweeps` times, and each time a branch hands on what arrived at its input the time before, at first nothing.
    """

    source: Source
    inputs: tuple[Site, ...]
    sweeps: int


@dataclass(frozen=True)
class Graph:
    """Where the network is cut, what is sent where, and which sites have a local loss.

    A site without an edge, a local loss or an upward edge gets no signal.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.DFA(), example=x)
        >>> site, source = learner.sites[0], learner.source
        >>> graph = fb.Graph(sites=(site,), edges=(fb.Edge(source, site, fb.Dense()),))
        >>> graph == learner.graph
        True
    """

    sites: tuple[Site, ...] = ()
    edges: tuple[Edge, ...] = ()
    local: tuple[Local, ...] = ()
    upward: tuple[UpwardEdge, ...] = ()
    branches: Branches | None = None

    def __post_init__(self) -> None:
        keys = [edge.key for edge in self.edges if not edge.operator.common]
        fed = [end.site for end in self._ends]
        fed += [end.reads for end in self.local if end.reads is not None]
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

    @property
    def repeated(self) -> tuple[Site, ...]:
        """The sites whose modules are called many times in a pass."""
        return tuple(site for site in self.sites if site.every)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules of the edges and local losses, each once."""
        return tuple({id(end.rule): end.rule for end in self._ends}.values())

    def of_rule(self, rule: Rule) -> Graph:
        """The graph whose edges and local losses belong to `rule`, unless they belong to another already."""
        return replace(
            self,
            edges=tuple(e if e.rule is not None else replace(e, rule=rule) for e in self.edges),
            local=tuple(e if e.rule is not None else replace(e, rule=rule) for e in self.local),
        )
