"""Several rules in one network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from torch import Tensor, nn

from feedbackward.errors import AttachError
from feedbackward.graph import Edge, Graph, Local, Site, Source, UpwardEdge
from feedbackward.operators.base import Weights
from feedbackward.rule import Properties, Rule
from feedbackward.rules.controls.bp import BP

if TYPE_CHECKING:
    from feedbackward.engine.phase import Phase

Pattern = str | Callable[[Site], bool]


@dataclass(frozen=True)
class Routed(Edge):
    """An edge of one of the mixed rules."""

    rule: Rule = field(kw_only=True)


@dataclass(frozen=True)
class Mixed(Rule):
    r"""A rule for each part of the network: convolutions by backprop and the classifier by DFA, for example.

    rules: a rule for each pattern. A pattern is compared with a site's name and with the names of the modules at whose output
        or input it is cut (`*` matches dots too). It may also be a function of the site. The first pattern that fits counts.
        Every site needs a pattern, and every pattern needs a site.

    Each rule makes its feedback graph for its own sites, from the same source. A rule decides on the signals *at* its sites,
    which train the layers below them. A site of :class:`BP` is not cut: the layers below it get the true gradient of the
    signal that arrives above. Rules that feed activities cannot be mixed with rules that feed the inputs of layers (FA and
    other chains), because a chain leaves skip paths whole.

    No paper. Han & Yoo 2019 (:class:`CDFA`) and Han et al. 2020, among others, use such mixtures.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 1, 6, 6), torch.randint(3, (16,))
        >>> model = nn.Sequential(
        ...     nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)
        ... )
        >>> rule = fb.Mixed({"2": fb.BP(), "4": fb.DFA()})  # by the names of sites
        >>> learner = fb.attach(model, rule, example=x)
        >>> [site.name for site in learner.graph.sites]  # a site of BP is not cut
        ['4']
    """

    rules: Mapping[Pattern, Rule] = field(hash=False)

    name = "mixed"
    paper = "several"

    def __post_init__(self) -> None:
        for pattern, rule in self.rules.items():
            if isinstance(rule, Mixed) or not isinstance(rule, Rule):
                raise AttachError(
                    f"the rule for {_words(pattern)} must be an instance of a Rule that is not Mixed itself, for example "
                    f"fb.DFA(), not {rule!r}."
                )
            if any(rule.delays(2)):
                raise AttachError(
                    f"{rule.label} is a schedule of the whole network, which has no part in a mixture: mix the rules, and delay their "
                    "gradients with fb.Delayed."
                )
            if rule.revises:
                raise AttachError(
                    f"{rule.label} revises the weights of the whole network, which has no part in a mixture: use DKP in its place."
                )
        parts = list(self.rules.values())
        if not parts:
            raise AttachError(
                'Mixed needs at least one pattern and its rule, for example {"*": fb.DFA()}.'
            )
        cutting = [rule for rule in parts if not isinstance(rule, BP)] or parts
        self._refuse_kinds(cutting)
        needed = {rule.needs for rule in cutting}
        of_all = {  # what other rules say in their class depends here on the rules that are mixed
            "label": " + ".join(dict.fromkeys(rule.label for rule in parts)),
            "feeds": cutting[0].feeds,
            "sends_activity": any(rule.sends_activity for rule in parts),
            "receives": any(rule.receives for rule in parts),
            "in_phase": any(rule.in_phase for rule in parts),
            "linear": all(rule.linear for rule in parts),
            "needs": next(need for need in ("target", "error", "nothing") if need in needed),
            "properties": _together([rule.properties for rule in parts]),
        }
        for key, value in of_all.items():
            object.__setattr__(self, key, value)

    @property
    def needs_error(self) -> bool:
        return any(rule.needs_error for rule in self.rules.values() if not isinstance(rule, BP))

    @property
    def least_batch(self) -> int:
        return max(rule.least_batch for rule in self.rules.values())

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        places: dict[Pattern, list[Site]] = {pattern: [] for pattern in self.rules}
        for site in sites:
            places[self._pattern(site)].append(site)
        cut: set[Site] = set()
        edges: list[Edge] = []
        local: list[Local] = []
        upward: list[UpwardEdge] = []
        for pattern, rule in self.rules.items():
            if not places[pattern]:
                names = ", ".join(site.name for site in sites[:8]) + (
                    ", ..." if len(sites) > 8 else ""
                )
                raise AttachError(
                    f"{self.label}: no site is left for {_words(pattern)}. The sites are {names}; the first pattern that fits counts."
                )
            part = rule.graph(places[pattern], source)
            cut.update(part.sites)
            edges += [_routed(edge, rule) for edge in part.edges]
            local += part.local
            upward += part.upward
        self._refuse_shared(edges)
        return Graph(
            tuple(site for site in sites if site in cut), tuple(edges), tuple(local), tuple(upward)
        )

    def learns(self, edge: Edge) -> bool:
        return _rule_of(edge).learns(edge)

    def learns_in_pass(self, edge: Edge) -> bool:
        return _rule_of(edge).learns_in_pass(edge)

    def message(
        self, edge: Edge, d: Tensor, target: Tensor | None, activity: Tensor | None
    ) -> Tensor:
        return _rule_of(edge).message(edge, d, target, activity)

    def receive(self, edge: Edge, sent: Tensor, h: Tensor) -> Tensor:
        return _rule_of(edge).receive(edge, sent, h)

    def feedback_grad(self, edge: Edge, weights: Weights, d: Tensor, h: Tensor) -> Weights:
        return _rule_of(edge).feedback_grad(edge, weights, d, h)

    def feedback_step(self, phase: Phase) -> None:
        for rule in {
            id(rule): rule for rule in map(_rule_of, phase.edges) if rule.in_phase
        }.values():
            rule.feedback_step(phase.part([edge for edge in phase.edges if _rule_of(edge) is rule]))

    def auxiliary(self, site: Site, source: Source) -> nn.Module:
        return self.rules[self._pattern(site)].auxiliary(site, source)

    def local_loss(self, output: Tensor, target: Tensor) -> Tensor:
        return next(rule for rule in self.rules.values() if _has_local(rule)).local_loss(
            output, target
        )

    def _pattern(self, site: Site) -> Pattern:
        """The first pattern that fits the site."""
        names = [site.name, *(point.module for point in site.points)]
        for pattern in self.rules:
            if (
                pattern(site)
                if callable(pattern)
                else any(fnmatchcase(name, pattern) for name in names)
            ):
                return pattern
        raise AttachError(
            f'{self.label}: no pattern fits the site {site.name!r}. Add one, or "*" as the last for all that is left.'
        )

    def _refuse_kinds(self, cutting: Sequence[Rule]) -> None:
        first = cutting[0]
        other = next((rule for rule in cutting if rule.feeds is not first.feeds), None)
        if other is not None:
            raise AttachError(
                f"{first.label} and {other.label} cannot be mixed: one feeds activities, the other inputs of layers, "
                "and skip paths would carry an error round the cuts. Mix direct rules (DFA, DKP) or chains (FA, KP); BP fits both."
            )
        losses = {type(rule).local_loss: rule.label for rule in cutting if _has_local(rule)}
        if len(losses) > 1:
            raise AttachError(
                f"{' and '.join(losses.values())} cannot be mixed: each has local losses of its own kind. Use one of them."
            )

    def _refuse_shared(self, edges: Sequence[Edge]) -> None:
        """Weights that are common to several edges belong to one rule."""
        owners: dict[str, Rule] = {}
        for edge in edges:
            rule = _rule_of(edge)
            if owners.setdefault(edge.key, rule) != rule:
                raise AttachError(
                    f"site {edge.site.name!r}: {rule.label} and {owners[edge.key].label} would use the same feedback weights "
                    f"({edge.key}). Give one of them another operator."
                )


def _rule_of(edge: Edge) -> Rule:
    assert isinstance(edge, Routed)
    return edge.rule


def _routed(edge: Edge, rule: Rule) -> Routed:
    return Routed(**{f.name: getattr(edge, f.name) for f in fields(Edge)}, rule=rule)


def _has_local(rule: Rule) -> bool:
    return type(rule).local_loss is not Rule.local_loss


def _words(pattern: Pattern) -> str:
    return getattr(pattern, "__name__", "a predicate") if callable(pattern) else repr(pattern)


def _together(properties: Sequence[Properties]) -> Properties:
    """A mixture is as unlocked as the most locked of its parts, and its costs are theirs, each for its part."""

    def listed(name: str) -> str:
        return " + ".join(dict.fromkeys(getattr(p, name) for p in properties))

    words = [p.weight_transport for p in properties if isinstance(p.weight_transport, str)]
    return Properties(
        backward_unlocked=all(p.backward_unlocked for p in properties),
        update_unlocked=all(p.update_unlocked for p in properties),
        forward_unlocked=all(p.forward_unlocked for p in properties),
        weight_transport=any(p.weight_transport is True for p in properties)
        or " + ".join(dict.fromkeys(words))
        or False,
        learned_feedback=any(p.learned_feedback for p in properties),
        backward_steps=listed("backward_steps"),
        extra_memory=listed("extra_memory"),
        extra_compute=listed("extra_compute"),
    )
