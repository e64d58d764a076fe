"""Looking at a trained run, and at the rules."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from feedbackward.experiment.training import checkpoint
from feedbackward.experiment.training.building import find_device, import_from_here, shared_data
from feedbackward.experiment.training.checkpoint import replace_file
from feedbackward.experiment.training.identity import check_same_data
from feedbackward.experiment.training.run import Run
from feedbackward.experiment.training.runfolder import RunFolder
from feedbackward.measure.probe import ParameterAlignment, Probe
from feedbackward.rules import RULES

MEASURES = (
    "angle",
    "cosine",
    "norm_ratio",
    "sign_agreement",
    "bp_norm",
    "jacobian_cosine",
    "readout",
)

LEGEND = """\
Unlocked: what need not wait for the layers above. Transport: whether feedback needs the forward weights.
Steps: products in sequence from the output's error to the last signal, of which backprop needs one less than layers (as in
`feedbackward cost`); 1 + 1: one more in the phase, after the first update. Memory, Compute: beyond backprop's.
L layers, N batch, C units of the source (classes), n features of all sites, W weights, c outputs of a layer, opt. optimizer state,
D the products of backprop's input gradients, which a rule with -D saves."""

HEADINGS = ("Rule", "Unlocked", "Transport", "Learned B", "Steps", "Memory", "Compute", "Paper")


def probe_run(path: Path, images: int | None, file: Path | None) -> None:
    """Print the alignment of a run's last checkpoint with backprop, and write it to ``file``."""
    folder = RunFolder.existing(path)
    state = checkpoint.load(folder.checkpoint)
    config = folder.config().resolved()
    if images is not None:
        config = replace(config, probe_images=images).resolved()
    import_from_here()
    run = Run(config, shared_data(config.data), find_device(config.device))
    run.load_weights(state, folder.checkpoint)
    check_same_data(state["data"], run.data, folder.checkpoint, "probe another run")
    found = run.probe()
    console = Console()
    epoch = state["position"]["epoch"]
    console.print(f"{config.rule} on {config.model}, after {epoch} epochs", style="bold")
    console.print(_alignment_table("signal at", found.sites))
    console.print(_alignment_table("gradient of", found.parameters))
    print(
        "Angle (degrees), cosine, norm ratio and equal signs: to backprop's own, whose norm is |BP|."
    )
    if file:
        _write(file, found)


def _write(file: Path, found: Probe) -> None:
    text = json.dumps(found.as_dict(), indent=1)
    replace_file(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _alignment_table(what: str, rows: Any) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(what, no_wrap=True)
    headings = dict(
        zip(
            MEASURES,
            ("angle", "cosine", "norm ratio", "signs", "|BP|", "B vs J", "readout"),
            strict=True,
        )
    )
    shown = [m for m in MEASURES if any(getattr(row, m, None) is not None for row in rows.values())]
    for measure in shown:
        table.add_column(headings[measure], justify="right")
    for name, row in rows.items():
        table.add_row(name, *(_number(row, measure) for measure in shown))
    return table


def _number(row: ParameterAlignment, measure: str) -> str:
    value = getattr(row, measure, None)
    if value is None or value != value:
        return "-"
    formats = {"angle": ".1f", "norm_ratio": ".3g", "bp_norm": ".1e"}
    return format(value, formats.get(measure, ".3f"))


def print_rules(form: str) -> None:
    """What each rule needs and costs: as a table, as Markdown, or as JSON."""
    rows = {
        name: {"label": rule.label, "paper": rule.paper, **asdict(rule.properties)}
        for name, rule in RULES.items()
    }
    if form == "json":
        print(json.dumps(rows, indent=1))
        return
    live = form == "table"
    table = Table(
        box=box.SIMPLE_HEAD if live else box.MARKDOWN, pad_edge=False, padding=(0, 1 - live)
    )
    console = Console() if live else Console(width=1000)
    headings = HEADINGS if console.width >= 120 else HEADINGS[:-1]  # dominates: without the paper
    for heading in headings:
        table.add_column(heading, no_wrap=heading == "Rule", overflow="fold")
    for name, row in rows.items():
        table.add_row(name, *_cells(row)[: len(headings) - 1])
    console.print(table)
    if live:
        print(LEGEND)


def _answer(value: bool | str) -> str:
    return value if isinstance(value, str) else "yes" if value else "no"


def _cells(row: dict[str, Any]) -> list[str]:
    unlocked = [what for what in ("backward", "update", "forward") if row[f"{what}_unlocked"]]
    return [
        "all" if len(unlocked) == 3 else ", ".join(unlocked) or "-",
        *(_answer(row[key]) for key in ("weight_transport", "learned_feedback")),
        *(row[key] for key in ("backward_steps", "extra_memory", "extra_compute", "paper")),
    ]
