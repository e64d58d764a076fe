"""The report of a study: results.json, table.md and one self-contained HTML page, and the table in the terminal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from feedbackward.experiment.grid.figures import figures, looks
from feedbackward.experiment.grid.texts import blocks, cell, head, notes, rates, runs, summary
from feedbackward.experiment.report.drawing import INK
from feedbackward.experiment.report.report import render, unwrapped, write_files
from feedbackward.experiment.report.summary import Results, clean, summarise


def write_study_report(results: Results, folder: str | Path) -> dict[str, Path]:
    """Write results.json, table.md and report.html into `folder`; returns their paths by name.

    Each file is replaced whole or not at all. Raises FeedbackError where the folder cannot be written.
    """
    results = clean(results | {"rules": None, "sites": None})
    view = _view(results)
    files: dict[
        str, Callable[[], bytes]
    ] = {  # numbers first: a figure that fails must not lose them
        "results.json": lambda: json.dumps(
            _summed(results), allow_nan=False, ensure_ascii=False
        ).encode(),
        "table.md": lambda: render("study.md", view),
        "report.html": lambda: render("study.html", view | _drawn(results)),
    }
    return write_files(Path(folder), files)


def print_study(results: Results, console: Console) -> None:
    """The tables, and what was run; outside a terminal they are Markdown and nothing is wrapped."""
    with unwrapped(console) as plain:
        console.print(plain(results["title"]), style="bold")
        for section in view_sections(results):
            console.print(plain(section["title"]), style="bold")
            for table in section["tables"]:
                console.print(_grid(table, plain, console.is_terminal))
        console.print(plain(summary(results)), style="bold")
        for note in notes(results):
            console.print(plain(f"- {note}"))


def _grid(table: dict[str, Any], plain: Callable[[str], Text], live: bool) -> Grid:
    view = Grid(box=box.SIMPLE_HEAD if live else box.MARKDOWN, pad_edge=not live)
    for name in (table["title"], *table["heads"]):
        view.add_column(plain(name), justify="left" if name == table["title"] else "right")
    for row in table["rows"]:
        view.add_row(plain(row["label"]), *map(plain, row["flat"]))
    return view


def view_sections(results: Results) -> list[dict[str, Any]]:
    """Sections, tables, rows and cells as text, ready for every form of the table."""
    found = []
    for section in results["sections"]:
        stepped = any(
            "sites" in block["point"] for table in section["tables"] for block in table["blocks"]
        )
        tables = [_table(table, stepped) for table in section["tables"]]
        found.append({**section, "stepped": stepped, "tables": tables})
    return found


def _table(table: Results, stepped: bool) -> dict[str, Any]:
    colours = {
        label: "currentColor" if s.colour == INK else s.colour for label, s in looks(table).items()
    }
    rows = []
    for label in table["labels"]:
        cells = [cell(block, label) for block in table["blocks"]]
        rows.append(
            {
                "label": label,
                "colour": colours[label],
                "cells": cells,
                "flat": [_flat(c, stepped) for c in cells],
            }
        )
    return {
        "title": table["title"],
        "heads": [head(block) for block in table["blocks"]],
        "rows": rows,
    }


def _flat(shown: dict[str, str], stepped: bool) -> str:
    """A cell in one line: `62.3 ± 1.2 (−3.1 ± 0.4), 8 steps`."""
    text = shown["text"] + (f" ({shown['gap']})" if shown["gap"] else "")
    return text + (f", {shown['steps']}" if stepped and shown["steps"] else "")


def _view(results: Results) -> dict[str, Any]:
    """What the templates show but for the figures."""
    return {
        "title": results["title"],
        "about": results["about"],
        "summary": summary(results),
        "notes": notes(results),
        "sections": view_sections(results),
        "command": results["command"],
        "created": str(results["created"])[:16].replace("T", " "),
        "facts": [
            (k, str(v))
            for k, v in results["environment"].items()
            if v not in (None, "") and k != "command"
        ],
        "rates": rates(results),
        "runs": runs(results),
        "config": results["config"],
    }


def _drawn(results: Results) -> dict[str, Any]:
    """The figures, and the comparisons that have any."""
    made = figures(results)
    shown = [block for block in blocks(results) if any(made["blocks"][block["folder"]].values())]
    return {
        "figures": made["tables"],
        "blocks": [{**block, **made["blocks"][block["folder"]]} for block in shown],
    }


def _summed(results: Results) -> Results:
    """With the statistics of every rule beside its runs."""
    sections = [
        {
            **s,
            "tables": [
                {**t, "blocks": [{**b, "summary": summarise(b)} for b in t["blocks"]]}
                for t in s["tables"]
            ],
        }
        for s in results["sections"]
    ]
    return {key: value for key, value in results.items() if key not in ("rules", "sites")} | {
        "sections": sections
    }
