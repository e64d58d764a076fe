"""One row per rule: the rule, its equations as naive loops, and the properties that the laws rely on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import oracles
from oracles import Array, Known

from feedbackward import BP, DFA, DKP, Dense, Frozen, Rule
from feedbackward.rules import DKPPC, EBD, FDFA, Flipped, GrAPE, SignDFA


@dataclass(frozen=True)
class Row:
    """signal, feedback: the oracle's teaching signal and feedback gradient (None: nothing is learned).

    direct: whether each site is fed straight from the source by weights `B` of its own. least_batch: as published.
    """

    name: str
    rule: Rule
    signal: Callable[[Known], Array | None]
    feedback: Callable[[Known], Array] | None = None
    direct: bool = True
    least_batch: int = 1

    def __str__(self) -> str:
        return self.name


class Equations:
    """The oracle's equations of a mixture: a row for each site, asked from the last site down."""

    feedback = None

    def __init__(self, rows: dict[str, Row]) -> None:
        self.rows = iter(reversed(rows.items()))
        self.learned: dict[str, Array] = {}

    def signal(self, known: Known) -> Array | None:
        site, row = next(self.rows)
        if row.feedback is not None:
            self.learned[site] = row.feedback(known)
        return row.signal(known)


ROWS = (
    Row("bp", BP(), oracles.backprop, direct=False),
    Row("frozen", Frozen(), oracles.nothing, direct=False),
    Row("dfa", DFA(), oracles.direct),
    Row("dfa-normal", DFA(operator=Dense("scaled_normal", 0.5)), oracles.direct),
    Row("dkp", DKP.published(), oracles.direct, oracles.outer_product),
    Row(
        "dkp-centred",
        DKP.published(center=True),
        oracles.direct,
        oracles.centred_outer_product,
        least_batch=2,
    ),
    Row("dkp-flipped", Flipped(DKP.published()), oracles.reversed_direct, oracles.outer_product),
    Row("dkp_pc", DKPPC.published(), oracles.direct),  # what its phase gives: test_rules_predictive
    Row("sign_dfa", SignDFA(), oracles.sign_of_error),
    Row("ebd", EBD(forget=1.0), oracles.direct, oracles.towards_correlation),
    Row(
        "fdfa", FDFA.published(operator=Dense()), oracles.direct
    ),  # what it learns, in a phase: test_rules_direct
    Row("grape", GrAPE(), oracles.normalised_direct),
)
DIRECT = tuple(row for row in ROWS if row.direct)
LEARNED = tuple(row for row in ROWS if row.feedback is not None)
