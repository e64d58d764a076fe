"""Several rules in one network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from feedbackward.activity import Site, Source
from feedbackward.errors import AttachError
from feedbackward.graph import Edge, Graph, Local, UpwardEdge
from feedbackward.rule import Rule
from feedbackward.rules.controls.bp import BP
from feedbackward.schedules.dsp import DSP

Pattern = str | Callable[[Site], bool]


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
            if isinstance(rule, DSP):
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
        transports = [rule.transport for rule in parts if rule.transport]
        # what other rules say in their class depends here on the rules that are mixed
        of_all = {
            "label": " + ".join(dict.fromkeys(rule.label for rule in parts)),
            "feeds": cutting[0].feeds,
            "learned": any(rule.learned for rule in parts),
            "unlocked": "backward" if all(r.unlocked == "backward" for r in parts) else "",
            "transport": True in transports
            or " + ".join(dict.fromkeys(map(str, transports)))
            or False,
        }
        for key, value in of_all.items():
            object.__setattr__(self, key, value)

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
            part = rule.connect(places[pattern], source)
            if part.branches:
                raise AttachError(
                    f"{rule.label} follows the skip paths of the whole network, which has no part in a mixture: use KolenPollack "
                    "in its place."
                )
            cut.update(part.sites)
            edges += part.edges
            local += part.local
            upward += part.upward
        self._refuse_shared(edges)
        return Graph(
            tuple(site for site in sites if site in cut), tuple(edges), tuple(local), tuple(upward)
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
                f"{first.label} and {other.label} cannot be mixed: one feeds activities, another inputs of layers or activations, "
                "and skip paths would carry an error round the cuts. Mix direct rules (DFA, DKP) or chains (FA, KP); BP fits both."
            )

    def _refuse_shared(self, edges: Sequence[Edge]) -> None:
        """Weights that are common to several edges belong to one rule."""
        owners: dict[str, Rule] = {}
        for edge in edges:
            if owners.setdefault(edge.key, edge.rule) != edge.rule:
                raise AttachError(
                    f"site {edge.site.name!r}: {edge.rule.label} and {owners[edge.key].label} would use the same feedback weights "
                    f"({edge.key}). Give one of them another operator."
                )


def _words(pattern: Pattern) -> str:
    return getattr(pattern, "__name__", "a predicate") if callable(pattern) else repr(pattern)
