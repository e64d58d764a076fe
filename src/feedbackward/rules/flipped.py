"""Another rule with the sign of every signal reversed: the control that says whether the direction of feedback matters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from ..errors import AttachError
from ..graph import Arc, Edge, Graph, Site, Source
from ..operators.base import Weights
from .base import Rule
from .dkp import DKP

if TYPE_CHECKING:
    from ..phase import Phase


@dataclass(frozen=True)
class Flipped(Rule):
    r"""A direct rule whose signals are negated: :math:`\delta h_l = -e\, B_l` in place of :math:`e\, B_l`.

    The feedback itself learns as the rule says, by the gradients that it would have got; what lies above the last site
    learns by its true gradient, as ever. A rule whose feedback carries a direction must do worse flipped than frozen
    features do. Fixed random feedback is as likely as its negative, so it trains flipped as well as it does unflipped.

    rule: the rule to flip, one with direct feedback.

    No paper: a control.
    """

    rule: Rule = field(default_factory=DKP)

    name = "flipped"
    paper = "control"

    def __post_init__(self) -> None:
        inner = self.rule
        if not isinstance(inner, Rule):
            raise AttachError(f"Flipped needs an instance of a Rule, for example fb.DKP(), not {inner!r}.")
        if issubclass(inner.feeds, Arc) or inner.sends_activity:
            raise AttachError(
                f"{inner.label} cannot be flipped: only a rule that sends one message directly to its sites has a sign of its own. "
                "Flip a direct rule (DKP, DFA, FDFA)."
            )
        of_inner = ("feeds", "sends_activity", "in_phase", "needs", "linear", "properties")
        for key in of_inner:
            object.__setattr__(self, key, getattr(inner, key))
        object.__setattr__(self, "label", f"{inner.label} flipped")

    @property
    def needs_error(self) -> bool:
        return self.rule.needs_error

    @property
    def least_batch(self) -> int:
        return self.rule.least_batch

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        graph = self.rule.graph(sites, source)
        if not graph.edges:
            raise AttachError(
                f"{self.rule.label} sends nothing, so there is no sign to flip: use DKP or DFA."
            )
        return graph

    def learns(self, edge: Edge) -> bool:
        return self.rule.learns(edge)

    def learns_in_pass(self, edge: Edge) -> bool:
        return self.rule.learns_in_pass(edge)

    def message(self, edge: Edge, d: Tensor, target: Tensor | None, activity: Tensor | None) -> Tensor:
        return -self.rule.message(edge, d, target, activity)

    def feedback_grad(self, edge: Edge, weights: Weights, d: Tensor, h: Tensor) -> Weights:
        return self.rule.feedback_grad(edge, weights, -d, h)  # `d` is what travelled

    def feedback_step(self, phase: Phase) -> None:
        self.rule.feedback_step(phase)
