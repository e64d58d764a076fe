"""Looking at a trained run, and at the rules."""

from __future__ import annotations

import json
from dataclasses import replace
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

MEASURES = (
    "angle",
    "cosine",
    "norm_ratio",
    "sign_agreement",
    "bp_norm",
    "jacobian_cosine",
    "readout",
)


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
