"""The table of rules: what each needs, and what it costs on one network."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from feedbackward.attaching import attach
from feedbackward.engine.size import in_bytes
from feedbackward.errors import AttachError
from feedbackward.experiment import nets
from feedbackward.measure.cost import Cost, count_cost
from feedbackward.rules import RULES, TIERS

NET, BATCH, SIZE, CLASSES, WEIGHTS = "vgg6", 100, (3, 32, 32), 10, "2.2 MB"
COUNTED_ON = (
    f"Steps, MACs and feedback are counted on {NET} (six convolutions and two fully connected layers) with {BATCH} images of "
    f"{SIZE[1]} x {SIZE[2]} pixels and {CLASSES} classes, as `feedbackward cost` counts them."
)
# what the columns say
LEGEND = {
    "Unlocked": "what need not wait. backward: no signal waits for another one; update: nor for the output's error; "
    "forward: nor for the layers above.",
    "Transport": "whether feedback needs the forward weights.",
    "Learned": "whether the feedback weights learn.",
}
COST_LEGEND = {
    "Steps": "products in sequence from the output's error to the last signal. not here: the rule cannot serve this network.",
    "MACs": "multiply-adds of a training step relative to backprop's, + those of one phase in which the feedback learns.",
    "Feedback": f"bytes of its weights, beside the network's own {WEIGHTS}.",
}


def facts() -> dict[str, dict[str, Any]]:
    """What each rule says of itself, by its name on the command line."""
    tiers = {name: tier for tier, rules in TIERS.items() for name in rules}
    return {
        name: {
            "label": rule.label,
            "tier": tiers.get(name, ""),
            "unlocked": rule.unlocked,
            "transport": rule().transport,
            "learned": rule().learned,
            "paper": rule.paper,
        }
        for name, rule in RULES.items()
    }


def costs() -> dict[str, dict[str, Any]]:
    """Steps, multiply-adds relative to backprop's, and bytes of feedback, of each rule on one network."""
    console = Console(stderr=True)
    counted = {name: _cost(name) for name in track(RULES, "counting", console=console)}
    backprop = counted["bp"]
    assert backprop is not None
    return {
        name: {}
        if cost is None
        else {
            "steps": cost.steps,
            "macs": cost.total / backprop.total,
            "phase_macs": None if cost.phase is None else cost.phase / backprop.total,
            "feedback_bytes": cost.feedback_bytes,
        }
        for name, cost in counted.items()
    }


def _cost(name: str) -> Cost | None:
    """What a step by the rule costs; None where the rule cannot serve the network."""
    # a delay changes when gradients are used, and costs nothing
    rule = RULES["bp" if name == "dsp" else name]()
    # how feedback begins costs no step, and what begins mirrored takes seconds to make
    if getattr(rule, "init", None) == "mirrored":
        rule = replace(rule, init="zeros")  # type: ignore[type-var]
    with warnings.catch_warnings():
        # of feedback larger than the model, which is what the table shows
        warnings.simplefilter("ignore")
        model, x = nets.build(NET, SIZE, CLASSES), torch.zeros(BATCH, *SIZE)
        try:
            learner = attach(model, rule, example=x[:2], sites=nets.default_sites(NET))
        except AttachError:
            return None
        return count_cost(learner, x)


def print_rules(form: str, cost: bool = False) -> None:
    """The table of rules in a terminal, as Markdown, or as JSON; with what each costs where `cost` is set."""
    rows = facts()
    if cost:
        for name, counted in costs().items():
            rows[name] |= counted
    if form == "json":
        print(json.dumps(rows, indent=1))
        return
    live = form == "table"
    console = Console() if live else Console(width=1000)
    table = Table(
        box=box.SIMPLE_HEAD if live else box.MARKDOWN, pad_edge=False, padding=(0, 1 - live)
    )
    for heading in headings(cost):
        table.add_column(heading, no_wrap=heading == "Rule", overflow="fold")
    for name, row in rows.items():
        table.add_row(*cells(name, row, cost))
    console.print(table)
    if live:
        for column, meaning in (LEGEND | COST_LEGEND if cost else LEGEND).items():
            console.print(f"{column}: {meaning}", highlight=False, markup=False)
        if cost:
            console.print(COUNTED_ON, highlight=False, markup=False)


def headings(cost: bool) -> list[str]:
    """The headings of the table."""
    counted = ["Steps", "MACs", "Feedback"] if cost else []
    return ["Rule", "Tier", "Unlocked", "Transport", "Learned", *counted, "Paper"]


def cells(name: str, row: dict[str, Any], cost: bool) -> list[str]:
    """One row of the table."""
    counted = []
    if cost:
        counted = ["not here"] + ["-"] * 2
        if "steps" in row:
            phase = f" + {row['phase_macs']:.2f}" if row["phase_macs"] else ""
            size = in_bytes(row["feedback_bytes"])
            counted = [str(row["steps"]), f"{row['macs']:.2f}{phase}", size]
    answers = [_answer(row[key]) for key in ("transport", "learned")]
    return [name, row["tier"], row["unlocked"] or "-", *answers, *counted, row["paper"]]


def _answer(value: bool | str) -> str:
    return value if isinstance(value, str) else "yes" if value else "no"
