"""The report of a comparison or a grid of them: terminal table, JSON, Markdown and one HTML page."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from feedbackward.errors import FeedbackError
from feedbackward.experiment.report import drawing, plots
from feedbackward.experiment.report.grid_figures import figures, looks
from feedbackward.experiment.report.numbers import fixed
from feedbackward.experiment.report.summary import (
    Results,
    at_floor,
    clean,
    conclusion,
    done_runs,
    has_feedback,
    label_of,
    last_probe,
    mean_of,
    sites_of,
    summarise,
)
from feedbackward.experiment.report.tables import (
    as_grid,
    blocks,
    columns_of,
    counts,
    is_single,
    notes,
    rates,
    runs,
    summary,
)

ASCII = str.maketrans({"±": "+/-", "×": "x", "°": " deg", "−": "-", "–": "-"})


def write_report(results: Results, folder: str | Path) -> dict[str, Path]:
    """Write results.json, report.md and report.html into `folder`; returns their paths by name.

    A single comparison has a picture.png too. Each file is replaced whole or not at all. results.json is
    `results` (NaN as null) with "summary" and "conclusion" of each comparison.

    Raises:
        FeedbackError: the folder cannot be written, or the schema is of another version.
    """
    document = as_grid(_clean(results))
    view = _view(document)
    # numbers first: a figure that fails must not lose them
    files: dict[str, Callable[[], bytes]] = {
        "results.json": lambda: _json_text(results),
        "report.md": lambda: render("report.md", view),
        "report.html": lambda: render("report.html", view | _drawn(document)),
    }
    if is_single(document):
        files["picture.png"] = lambda: plots.picture(blocks(document)[0])
    return write_files(Path(folder), files)


def print_report(results: Results, console: Console) -> None:
    """Tables, conclusion and notes; outside a terminal the tables are Markdown and nothing is wrapped."""
    document = as_grid(_clean(results))
    with unwrapped(console) as plain:
        console.print(plain(_title(document)), style="bold")
        for section in _sections(document):
            if section["title"]:
                console.print(plain(section["title"]), style="bold")
            for table in section["tables"]:
                console.print(_grid(table, plain, console.is_terminal))
        console.print(plain(summary(document)), style="bold")
        for note in notes(document):
            console.print(plain(f"- {note}"))


def failed_cells(results: Results) -> int:
    """How many cells failed."""
    return counts(as_grid(results))["failed"]


def _clean(results: Results) -> Results:
    found = clean(results)
    return {k: v for k, v in found.items() if k in results or "sections" not in results}


def _json_text(results: Results) -> bytes:
    """The results with the statistics of every rule beside its runs."""

    def summed(block: Results) -> Results:
        return {**block, "summary": summarise(block)}

    found = _clean(results)
    if "sections" in found:
        found["sections"] = [
            {**s, "tables": [{**t, "blocks": list(map(summed, t["blocks"]))} for t in s["tables"]]}
            for s in found["sections"]
        ]
    else:
        found = summed(found) | {"conclusion": conclusion(found)}
    return json.dumps(found, indent=1, allow_nan=False, ensure_ascii=False).encode()


def _title(document: Results) -> str:
    return str(document.get("title") or "Comparison of learning rules")


def _grid(table: dict[str, Any], plain: Callable[[str], Text], live: bool) -> Table:
    """A table in a terminal, dense enough for 80 columns, or in a log as Markdown."""
    style: dict[str, Any] = {"box": box.MARKDOWN}
    if live:
        style = {"box": box.SIMPLE_HEAD, "pad_edge": False, "padding": (0, 1, 0, 0)}
    # the notes report diverged runs
    shown = [i for i, head in enumerate(table["heads"]) if not (live and head == "Diverged")]
    view = Table(**style)
    view.add_column(plain(table["title"] or "Rule"))
    for i in shown:
        head = table["heads"][i]
        view.add_column(plain(head.replace(" ", "\n") if live else head), justify="right")
    for row in table["rows"]:
        cells = [row["flat"][i].replace(" ± ", "±") if live else row["flat"][i] for i in shown]
        view.add_row(plain(row["label"]), *map(plain, cells))
    return view


@contextmanager
def unwrapped(console: Console) -> Iterator[Callable[[str], Text]]:
    """Nothing is wrapped meanwhile unless it is a terminal. Gives what makes of a text one that the console's encoding can show."""
    encoding, width = console.encoding or "utf-8", console.width

    def plain(text: str) -> Text:
        if not encoding.lower().startswith("utf"):
            text = text.translate(ASCII).encode(encoding, "replace").decode(encoding)
        return Text(text)

    if not console.is_terminal:
        console.width = 1000  # a log file has no edge; without this, rich cuts cells to 80 columns
    try:
        yield plain
    finally:
        console.width = width


def write_files(folder: Path, files: Mapping[str, Callable[[], bytes]]) -> dict[str, Path]:
    """Make and write files, each there whole or not at all; returns their paths by name. Raises FeedbackError where the folder
    cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, make in files.items():
            replace_whole(folder / name, make())
    except OSError as error:
        raise FeedbackError(
            f"The report cannot be written to {folder}: {error.strerror or error}. "
            "Name a folder that you may write to."
        ) from error
    return {name: folder / name for name in files}


def replace_whole(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all."""
    # always of the same name: what a killed process leaves is written over
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def render(name: str, view: dict[str, Any]) -> bytes:
    """A template of this package, filled in."""
    loader = jinja2.PackageLoader("feedbackward.experiment.report", "templates")
    environment = jinja2.Environment(
        loader=loader,
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = _cell
    return environment.get_template(name).render(view).encode()


def _cell(text: object) -> str:
    """Text that stays inside one cell of a Markdown table and starts no HTML."""
    return str(text).replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=False, default=str)


def _sections(document: Results) -> list[dict[str, Any]]:
    """Sections, tables, rows and cells as text, ready for every form of the table."""
    found = []
    for section in document["sections"]:
        stepped = any("sites" in b["point"] for t in section["tables"] for b in t["blocks"])
        tables = [_table(table, stepped) for table in section["tables"]]
        found.append({**section, "stepped": stepped, "tables": tables})
    return found


def _table(table: Results, stepped: bool) -> dict[str, Any]:
    heads, cells = columns_of(table)
    styles = looks(table)
    rows = [
        {
            "label": label,
            "colour": _colour(styles[label]),
            "cells": row,
            "flat": [_flat(cell, stepped) for cell in row],
        }
        for label, row in zip(table["labels"], cells, strict=True)
    ]
    return {"title": table["title"], "heads": heads, "rows": rows}


def _colour(style: drawing.Style) -> str:
    return "currentColor" if style.colour == drawing.INK else style.colour


def _flat(shown: dict[str, str], stepped: bool) -> str:
    """A cell in one line: `62.3 ± 1.2 (−3.1 ± 0.4), 8 steps`."""
    text = shown["text"] + (f" ({shown['gap']})" if shown["gap"] else "")
    return text + (f", {shown['steps']}" if stepped and shown["steps"] else "")


def _view(document: Results) -> dict[str, Any]:
    """What the templates show but for the figures."""
    single, config = is_single(document), document.get("config") or {}
    first = blocks(document)[0]
    shown = ("rule", "label", "options", "rates", "cost", "step_ms", "peak_bytes")
    settings = [_json({k: rule[k] for k in shown if rule.get(k)}) for rule in first["rules"]]
    return {
        "title": _title(document),
        "about": document["about"],
        "single": single,
        "summary": summary(document),
        "notes": notes(document),
        "sections": _sections(document),
        "command": document.get("command") or "(the command was not recorded)",
        "facts": _facts(first if single else {}, document),
        "rates": [row[1:] if single else row for row in rates(document)],
        "runs": [row[1:] if single else row for row in runs(document)],
        "settings": "\n".join(settings) if single else "",
        "config": config if isinstance(config, str) else _json(config, indent=2),
        "angles": _angles(first) if single else ([], []),
        "floor": "1e-7",
    }


def _drawn(document: Results) -> dict[str, Any]:
    """The figures of the tables and of each comparison that has any."""
    single = is_single(document)
    made = [
        {"title": block["title"], "figures": plots.figures(block, "" if single else f"b{number}-")}
        for number, block in enumerate(blocks(document))
    ]
    shown = [block for block in made if any(block["figures"].values())]
    return {"figures": {} if single else figures(document), "blocks": shown}


def _facts(block: Results, document: Results) -> list[tuple[str, str]]:
    """Data, model, date and environment as pairs of name and text."""
    data, model = block.get("data") or {}, block.get("model") or {}
    model = {"name": model} if isinstance(model, str) else model
    counts = [
        f"{data[key]:,} {key}"
        for key in ("train", "validation", "test", "classes")
        if data.get(key)
    ]
    count = model.get("parameters")
    found = [
        ("data", ", ".join(filter(None, [data.get("name"), *counts, data.get("note")]))),
        (
            "model",
            ", ".join(filter(None, [model.get("name"), f"{count:,} parameters" if count else ""])),
        ),
        ("created", str(document.get("created") or "")[:16].replace("T", " ")),
        *(document.get("environment") or {}).items(),
    ]
    return [(n, str(value)) for n, value in found if value not in (None, "") and n != "command"]


def _angles(results: Results) -> tuple[list[str], list[list[str]]]:
    """Labels of the rules with hidden feedback, and per site its mean angle at the last probe under each."""
    rules = [r for r in results["rules"] if has_feedback(r) and any(map(last_probe, done_runs(r)))]
    probes = [[last_probe(run).get("sites") or {} for run in done_runs(rule)] for rule in rules]
    rows = []
    for site in dict.fromkeys(site for rule in rules for site in sites_of(rule)):
        cells = [[probe.get(site) or {} for probe in rule_probes] for rule_probes in probes]
        marks = ["*" if any(map(at_floor, cell)) else "" for cell in cells]
        means = [mean_of(entry.get("angle") for entry in cell) for cell in cells]
        rows.append([site, *(fixed(mean) + mark for mean, mark in zip(means, marks, strict=True))])
    return [label_of(rule) for rule in rules], rows if rules else []
