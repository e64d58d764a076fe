"""Running `feedbackward bench`, and telling what it found: a table, JSON, a figure."""

from __future__ import annotations

import datetime
import io
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from feedbackward.experiment.benchmark.bench import Bench, Row, summary
from feedbackward.experiment.benchmark.cases import BenchConfig, make_cases
from feedbackward.experiment.config.files import to_dict
from feedbackward.experiment.report.drawing import INK, drawing
from feedbackward.experiment.training.building import find_device
from feedbackward.experiment.training.checkpoint import replace_file
from feedbackward.experiment.training.environment import environment
from feedbackward.experiment.training.interrupts import InterruptedRunError, Interrupts
from feedbackward.experiment.training.progress import Progress

LEGEND = """\
Step: zero gradients, forward, loss, backward, the feedback's own phase where a rule has one, SGD with momentum of all weights;
median of the rounds, in each of which every configuration takes one step. Of BP: relative to bp in the same round, median
(least-most). Activations: the most bytes alive in a step, less weights, gradients, feedback, optimizer state and the batch."""


def run_bench(config: BenchConfig, arguments: Sequence[str]) -> int:
    """Measure, print a table per model, and write the files; returns the exit code.

    A signal stops it between two steps: what was measured so far is printed and written, and the code is 128 + the signal.
    """
    for file in filter(None, (config.json, config.plot)):
        Path(file).parent.mkdir(parents=True, exist_ok=True)  # now rather than when all is done
    if config.threads:
        torch.set_num_threads(config.threads)
    device = find_device(config.device)
    measured, stopped, console = [], 0, Console()
    with Interrupts() as interrupts:
        for model in config.models:
            with Progress() as progress:
                bench = Bench(make_cases(config, model, device), device, progress, interrupts.check)
                try:
                    bench.measure(config.rounds)
                except InterruptedRunError as stop:
                    stopped = stop.signum
            measured.append({"model": model, "rows": summary(bench.rows, config.batch)})
            print_rows(describe(config, model), bench.rows, config.batch, console)
            if stopped:
                break
    print(LEGEND)
    head = {"settings": to_dict(config), "interrupted": bool(stopped)}
    command = shlex.join(["feedbackward", "bench", *arguments])
    results = document(head, measured, device, command)
    if config.json:
        write_json(Path(config.json), results)
    if config.plot:
        write_plot(Path(config.plot), results)
    return 128 + stopped if stopped else 0


def describe(config: BenchConfig, model: str) -> str:
    """What all rows of a model have in common."""
    image = f"{config.channels}x{config.size}x{config.size}"
    parts = [model, f"batch {config.batch}", image, f"{config.classes} classes", config.precision]
    parts += [word for word in ("compile", "channels_last") if getattr(config, word)]
    return ", ".join([*parts, f"n = {config.rounds} rounds"])


def document(
    head: dict[str, Any],
    measured: list[dict[str, Any]],
    device: torch.device,
    command: str | None = None,
) -> dict[str, Any]:
    """All that a result needs to be understood later: command, date, hardware, versions, settings, numbers."""
    found = environment(device)
    return {
        "command": command or found.pop("command"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "environment": {key: value for key, value in found.items() if key != "command"},
        **head,
        "models": measured,
    }


def print_rows(title: str, rows: Sequence[Row], batch: int, console: Console) -> None:
    """The table, and below it what was refused and why."""
    if not console.is_terminal:
        console = Console(file=console.file, width=200)  # a log is not wrapped
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=escape(title), title_justify="left")
    for heading in ("Rule", "Schedule", "Operator"):
        table.add_column(heading, no_wrap=True)
    for heading in ("Step ms", "of BP", "", "Images/s", "Activations MB", "of BP", "Feedback MB"):
        table.add_column(heading, justify="right", no_wrap=True)
    found = summary(rows, batch)
    for row in found:
        if not row["refused"]:
            table.add_row(*(escape(cell) for cell in _cells(row)))
    console.print(table)
    for row, full in zip(found, rows, strict=True):
        if row["refused"] or row["note"]:
            what = f"refused: {row['refused']}" if row["refused"] else row["note"]
            console.print(escape(f"{full.case.label}: {what}"), soft_wrap=True, highlight=False)


def _cells(row: dict[str, Any]) -> list[str]:
    time, ratio = row["ms"], row["time_ratio"]
    return [
        *(row[key] for key in ("rule", "schedule", "operator")),
        *((f"{time['median']:.1f}",) if time else ("-",)),
        *(
            (f"{ratio['median']:.3f}", f"({ratio['min']:.3f}-{ratio['max']:.3f})")
            if ratio
            else ("-", "")
        ),
        f"{row['images_per_second']:.0f}" if time else "-",
        _mega(row["activation_bytes"]),
        "-" if row["activation_ratio"] is None else f"{row['activation_ratio']:.3f}",
        _mega(row["feedback_bytes"]),
    ]


def _mega(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:.2f}"


def write_json(path: Path, results: dict[str, Any]) -> None:
    """The results, whole or not at all."""
    text = json.dumps(results, indent=1) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_plot(path: Path, results: dict[str, Any]) -> None:
    """Per model a row of two panels: time of a step and memory of its activations, both relative to BP."""
    models = [
        (m["model"], [row for row in m["rows"] if not row["refused"]]) for m in results["models"]
    ]
    lines = [max(2, len(rows)) for _, rows in models]
    with drawing():
        size = (9, 0.8 * len(models) + 0.26 * sum(lines))
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        panels = figure.subplots(len(models), 2, squeeze=False, height_ratios=lines)
        for (name, rows), (left, right) in zip(models, panels, strict=True):
            _time_panel(left, rows)
            _memory_panel(right, rows)
            left.set_title(name, loc="left", weight="bold", size=10.5)
        stream = io.BytesIO()
        figure.savefig(stream, format=path.suffix[1:], dpi=180)
    replace_file(path, lambda temporary: temporary.write_bytes(stream.getvalue()))


def _time_panel(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    labels = [", ".join(part for part in _names(row) if part != "-") for row in rows]
    for at, row in enumerate(rows):
        ratio = row["time_ratio"]
        if ratio:
            axes.plot([ratio["min"], ratio["max"]], [at, at], color=INK, lw=1.2)
            axes.plot(ratio["median"], at, "o", color="#1b7bbd", ms=5)
    _panel(axes, "step time relative to BP (median and range)", labels)


def _memory_panel(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    for at, row in enumerate(rows):
        if row["activation_ratio"] is not None:
            axes.plot([0, row["activation_ratio"]], [at, at], color="#d55e00", lw=1.2)
            axes.plot(row["activation_ratio"], at, "s", color="#d55e00", ms=5)
    _panel(axes, "memory of activations relative to BP", [""] * len(rows))


def _panel(axes: Axes, name: str, labels: list[str]) -> None:
    axes.axvline(1, color=INK, lw=0.8, ls=":")
    axes.set(xlabel=name, ylim=(len(labels) - 0.5, -0.5))
    axes.set_xlim(0, max(1.1, axes.get_xlim()[1]))
    axes.set_yticks(range(len(labels)), labels, size=8.5)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.label.set_fontsize(8.5)
    axes.grid(axis="x")


def _names(row: dict[str, Any]) -> list[str]:
    return [row["rule"], row["schedule"], row["operator"]]
