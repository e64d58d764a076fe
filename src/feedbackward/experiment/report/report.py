"""The report of a comparison: terminal table, JSON, Markdown, a picture and one self-contained HTML page."""

import json
import os
import tempfile
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
    notes,
    sites_of,
    summarise,
)

__all__ = ["print_summary", "render", "replace_whole", "summarise", "write_report"]

NONE = "–"
ASCII = str.maketrans({"±": "+/-", "×": "x", "°": " deg", "−": "-", "–": "-"})


def fixed(value: float | None, sign: bool = False) -> str:
    """One decimal, a true minus sign, never "-0.0"; a dash for None."""
    if value is None:
        return NONE
    rounded = round(value, 1) + 0.0
    return f"{rounded:{'+' if sign else ''}.1f}".replace("-", "−")


def plus_minus(value: float | None, error: float | None, sign: bool = False) -> str:
    """`value ± error`, or the value alone where there is no error."""
    return fixed(value, sign) + ("" if error is None else f" ± {fixed(error)}")


def size(count: int | None) -> str:
    """Bytes as a short decimal size."""
    if not count:
        return NONE if count is None else "none"
    amount, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 999.5 or unit == "GB":
            break
        amount /= 1000
    return f"{amount:.3g} {unit}"


def _difference(value: dict[str, Any] | None, sign: bool = False) -> str:
    return NONE if value is None else plus_minus(value["mean"], value["se"], sign)


def _ratio(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}×"


def _count(row: dict[str, Any]) -> str:
    if row["refused"]:
        return NONE
    return str(row["n"]) if row["n"] == row["planned"] else f"{row['n']}/{row['planned']}"


def table(results: Results) -> dict[str, list[str]]:
    """Heading of each column and its cells, one per rule; a column without any value is left out."""
    columns: dict[str, list[str]] = {}
    for row in summarise(results):
        cells = {
            "Rule": str(row["label"]),
            "Test accuracy (%)": "refused"
            if row["refused"]
            else plus_minus(row["mean"], row["std"]),
            "n": _count(row),
            "Diverged": str(row["diverged"]) if row["diverged"] else NONE,
            "Gap to BP": _difference(row["gap"]),
            "vs Frozen": _difference(row["frozen"], sign=True),
            "Time per step": _ratio(row["step_ratio"]),
            "Peak memory": _ratio(row["peak_ratio"]),
            "Mean angle": NONE if row["angle"] is None else f"{fixed(row['angle'])}°",
            "Feedback": size(row["feedback_bytes"]),
        }
        for name, cell in cells.items():
            columns.setdefault(name, []).append(cell)
    return {name: cells for name, cells in columns.items() if set(cells) != {NONE}}


def print_summary(results: Results, console: Console) -> None:
    """Table, conclusion and notes; outside a terminal the table is Markdown and nothing is wrapped."""
    live = console.is_terminal
    style: dict[str, Any] = {"box": box.MARKDOWN}
    columns = table(results)
    if live:  # dominates enough for 80 columns: the notes below tell of diverged runs
        style = {"box": box.SIMPLE_HEAD, "pad_edge": False, "padding": (0, 1, 0, 0)}
        columns.pop("Diverged", None)
        columns = {name.replace(" ", "\n"): cells for name, cells in columns.items()}
    view = Table(**style)
    with unwrapped(console) as plain:
        for heading in columns:
            view.add_column(plain(heading), justify="left" if heading == "Rule" else "right")
        for row in zip(*columns.values(), strict=True):
            view.add_row(*(plain(cell.replace(" ± ", "±") if live else cell) for cell in row))
        console.print(
            plain(str(results.get("title") or "Comparison of learning rules")), style="bold"
        )
        console.print(view)
        console.print(plain(conclusion(results)), style="bold")
        for note in notes(results):
            console.print(plain(f"- {note}"))


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


def write_report(results: Results, folder: str | Path) -> dict[str, Path]:
    """Write results.json, report.md, report.html and picture.png into `folder`; returns their paths by name.

    Each file is replaced whole or not at all. results.json is `results` (NaN as null) with "summary" and
    "conclusion" added. Raises FeedbackError if the folder cannot be written or the schema is another version.
    """
    results = clean(results)
    written = {**results, "summary": summarise(results), "conclusion": conclusion(results)}
    view = _view(results)
    files: dict[
        str, Callable[[], bytes]
    ] = {  # numbers first: a figure that fails must not lose them
        "results.json": lambda: json.dumps(
            written, indent=1, allow_nan=False, ensure_ascii=False
        ).encode(),
        "report.md": lambda: render("report.md", view),
        "report.html": lambda: render("report.html", {**view, "sections": plots.figures(results)}),
        "picture.png": lambda: plots.picture(results),
    }
    return write_files(Path(folder), files)


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
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would keep a shared folder's other readers out
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
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


def _view(results: Results) -> dict[str, Any]:
    """What both templates show: text, ready to print."""
    columns = table(results)
    rules = results["rules"]
    shown = ("rule", "label", "options", "rates", "cost", "step_ms", "peak_bytes")
    return {
        "title": str(results.get("title") or "Comparison of learning rules"),
        "command": results.get("command") or "(the command was not recorded)",
        "conclusion": conclusion(results),
        "notes": notes(results),
        "headings": list(columns),
        "rows": [list(row) for row in zip(*columns.values(), strict=True)],
        "runs": [[label_of(rule), *_run(run)] for rule in rules for run in rule.get("runs") or []],
        "facts": _facts(results),
        "settings": "\n".join(
            _json({key: rule[key] for key in shown if rule.get(key)}) for rule in rules
        ),
        "config": _json(results.get("config") or {}, indent=2),
        "colours": [
            "currentColor" if s.colour == drawing.INK else s.colour for s in drawing.styles(results)
        ],
        "angles": _angles(results),
        "floor": "1e-7",
    }


def _run(run: Results) -> list[str]:
    accuracies = [fixed(run.get(key)) for key in ("test_accuracy", "validation_accuracy")]
    return [str(run.get("seed")), str(run.get("status")), *accuracies, fixed(run.get("seconds"))]


def _facts(results: Results) -> list[tuple[str, str]]:
    """Data, model, date and environment as pairs of name and text."""
    data, model = results.get("data") or {}, results.get("model") or {}
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
        ("created", str(results.get("created") or "")[:16].replace("T", " ")),
        *(results.get("environment") or {}).items(),
    ]
    return [(name, str(value)) for name, value in found if value not in (None, "")]


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
