"""The figures of `feedbackward cost`: counted multiply-adds and bytes, measured time and memory."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from feedbackward.experiment.benchmark.counted import Row
from feedbackward.experiment.benchmark.units import KINDS, SCHEDULES, unit
from feedbackward.experiment.report.drawing import INK, drawing
from feedbackward.experiment.training.checkpoint import replace_file
from feedbackward.measure.cost import Cost


def plot_counted(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Two panels with a row per rule and operator: multiply-adds by what they are for, and bytes held by schedule."""
    done = [(row, row.cost) for row in rows if row.cost is not None]
    with drawing():
        size = (9.6, 1.5 + 0.25 * max(4, len(done)))
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        left, right = figure.subplots(1, 2, width_ratios=[1.35, 1])
        _stacks(left, [cost for _, cost in done])
        _held(right, [cost for _, cost in done])
        for axes, names in ((left, [row.name for row, _ in done]), (right, [""] * len(done))):
            axes.set_ylim(len(done) - 0.5, -0.5)
            axes.set_yticks(range(len(done)), names, size=8.5)
            axes.tick_params(axis="y", length=0)
            axes.xaxis.label.set_fontsize(8.5)
            axes.grid(axis="x")
            axes.set_axisbelow(True)
        left.set_title(title, loc="left", weight="bold", size=10.5)
        figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=8.5)
        _save(figure, path)


def _stacks(axes: Axes, costs: Sequence[Cost]) -> None:
    size, name_of_unit, _ = unit(costs[0].total)
    starts = [0.0] * len(costs)
    for kind, _, name, colour in KINDS:
        widths = [getattr(cost, kind) / size for cost in costs]
        if any(widths):
            axes.barh(range(len(costs)), widths, 0.62, left=starts, color=colour, label=name, lw=0)
            starts = [start + width for start, width in zip(starts, widths, strict=True)]
    axes.axvline(starts[0], color=INK, lw=0.8, ls=":")
    where = axes.get_yaxis_transform()
    axes.text(1.01, -0.75, "of bp", va="center", size=8, weight="bold", transform=where)
    for at, cost in enumerate(costs):
        axes.text(
            1.01, at, f"{cost.total / costs[0].total:.2f}", va="center", size=8, transform=where
        )
    axes.set_xlim(0, 1.04 * max(starts))
    axes.set_xlabel(f"multiply-adds of a step ({name_of_unit})")


def _held(axes: Axes, costs: Sequence[Cost]) -> None:
    size, name_of_unit, _ = unit(costs[0].held["joint"] or 0)
    for name, colour, marker in SCHEDULES:
        found = [(at, cost.held[name]) for at, cost in enumerate(costs)]
        points = [(at, count / size) for at, count in found if count is not None]
        if points:
            rows, sizes = zip(*points, strict=True)
            axes.hlines(rows, 0, sizes, color=colour, lw=1.2, alpha=0.5)
            axes.plot(sizes, rows, marker, color=colour, ms=5, label=f"held: {name}")
    axes.set_xlim(0, 1.08 * axes.get_xlim()[1])
    axes.set_xlabel(f"activations held for the backward pass ({name_of_unit}B)")


def plot_measured(path: Path, measured: Sequence[dict[str, Any]]) -> None:
    """Per model a row of two panels: time of a step and memory of its activations, both relative to BP."""
    models = [(m["model"], [row for row in m["rows"] if not row["refused"]]) for m in measured]
    lines = [max(2, len(rows)) for _, rows in models]
    with drawing():
        size = (9, 0.8 * len(models) + 0.26 * sum(lines))
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        panels = figure.subplots(len(models), 2, squeeze=False, height_ratios=lines)
        for (name, rows), (left, right) in zip(models, panels, strict=True):
            _time_panel(left, rows)
            _memory_panel(right, rows)
            left.set_title(name, loc="left", weight="bold", size=10.5)
        _save(figure, path)


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


def _save(figure: Figure, path: Path) -> None:
    stream = io.BytesIO()
    figure.savefig(stream, format=path.suffix[1:], dpi=180)
    replace_file(path, lambda temporary: temporary.write_bytes(stream.getvalue()))
