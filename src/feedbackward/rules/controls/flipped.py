"""Another rule with the sign of every signal reversed: the control that says whether the direction of feedback matters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from feedbackward.activity import LayerInput, Site, Source
from feedbackward.errors import AttachError
from feedbackward.graph import Graph
from feedbackward.rule import Rule
from feedbackward.rules.direct.dkp import DKP


@dataclass(frozen=True)
class Flipped(Rule):
    r"""A direct rule whose signals are negated: :math:`\delta h_l = -e\, B_l` in place of :math:`e\, B_l`.

    The feedback learns as the rule says. What lies above the last site learns by its true gradient, as always. A rule whose
    feedback carries a direction must do worse flipped than frozen features do. Fixed random feedback is as likely as its
    negative, so flipped it trains as well as before.

    rule: the rule to flip, which must have direct feedback.

    No paper: a control.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> gradients = []
        >>> for rule in (fb.DFA(), fb.rules.Flipped(fb.DFA())):
        ...     model.zero_grad()
        ...     learner = fb.attach(model, rule, example=x)
        ...     nn.functional.cross_entropy(learner(x), y).backward()
        ...     gradients.append(model[0].weight.grad.clone())
        >>> torch.equal(gradients[0], -gradients[1])
        True
    """

    rule: Rule = field(default_factory=DKP)

    name = "flipped"
    paper = "control"

    def __post_init__(self) -> None:
        if not isinstance(self.rule, Rule):
            raise AttachError(
                f"Flipped needs an instance of a Rule, for example fb.DKP(), not {self.rule!r}."
            )
        for key in ("feeds", "transport", "learned"):
            object.__setattr__(self, key, getattr(self.rule, key))
        object.__setattr__(self, "label", f"{self.rule.label} flipped")

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        graph = self.rule.connect(sites, source)
        if issubclass(self.feeds, LayerInput) or {edge.source for edge in graph.edges} != {source}:
            raise AttachError(
                f"{self.rule.label} cannot be flipped: a sign is reversed once for every site, so each must be fed straight from "
                f"the source {source.name!r}. Flip a direct rule (DKP, DFA, FDFA)."
            )
        return replace(graph, edges=tuple(replace(e, factor=-e.factor) for e in graph.edges))
