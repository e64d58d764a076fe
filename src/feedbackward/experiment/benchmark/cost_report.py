"""Running `feedbackward cost`, and telling what it counted: tables, JSON, a figure."""

from __future__ import annotations

import io
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

from feedbackward import __version__
from feedbackward.experiment.benchmark.cost import CostConfig, Row, count_rows
from feedbackward.experiment.benchmark.report import write_json
from feedbackward.experiment.config.files import to_dict
from feedbackward.experiment.report.drawing import INK, drawing
from feedbackward.experiment.training.checkpoint import replace_file
from feedbackward.measure.cost import Cost

LEGEND = """\
Forward, weight and input gradients: of the network; input gradients end at a cut. Signals: from the errors to the sites. Learn B:
gradients of the feedback weights. Aux.: networks of local losses. Phase: one call of feedback_step, not in the total. Norms,
activations and the optimizer are not counted.
Steps: products in sequence from the output's error to the last signal. Errors: what travels along the feedback graph's edges.
Held: the most that autograd keeps for the backward pass at any time, in one backward pass (joint), in a replayed one, or within
the forward pass (eager); - where the rule or the sites do not allow it."""

# of multiply-adds: field, heading in the table, name in the figure, colour
KINDS = (
    ("forward", "forward", "forward", "#7d858e"),
    ("weight_gradients", "weight gr.", "weight gradients", "#1b7bbd"),
    ("input_gradients", "input gr.", "input gradients", "#d55e00"),
    ("feedback", "signals", "feedback signals", "#009e73"),
    ("learning", "learn B", "learning of feedback", "#b0568f"),
    ("auxiliary", "aux.", "auxiliary nets", "#a07a00"),
)
ALWAYS = 4  # of these have a column, the others where a rule has any
SCHEDULES = (("joint", "#1b7bbd", "o"), ("replay", "#d55e00", "s"), ("eager", "#009e73", "D"))


def run_cost(config: CostConfig, arguments: Sequence[str]) -> int:
    """Count, print the tables, and write the files; returns the exit code."""
    for file in filter(None, (config.json, config.plot)):
        Path(file).parent.mkdir(parents=True, exist_ok=True)  # now rather than when all is done
    with Console(stderr=True).status("counting bp") as status:
        rows = count_rows(config, lambda name: status.update(f"counting {name}"))
    print_rows(describe(config), rows, Console())
    print(LEGEND)
    if config.json:
        write_json(Path(config.json), document(config, rows, arguments))
    if config.plot:
        write_plot(Path(config.plot), describe(config), rows)
    return 0


def describe(config: CostConfig) -> str:
    """What all rows have in common."""
    image = f"{config.channels}x{config.size}x{config.size}"
    return f"{config.model}, batch {config.batch}, {image}, {config.classes} classes"


def document(config: CostConfig, rows: Sequence[Row], arguments: Sequence[str]) -> dict[str, Any]:
    """All numbers, and what they are of."""
    best = _backprop(rows).total
    return {
        "command": shlex.join(["feedbackward", "cost", *arguments]),
        "versions": {"feedbackward": __version__, "torch": torch.__version__},
        "settings": to_dict(config),
        "rows": [
            {
                "name": row.rule,
                "operator": row.operator,
                "refused": row.refused,
                **({**row.cost.as_dict(), "of_bp": row.cost.total / best} if row.cost else {}),
            }
            for row in rows
        ],
    }


def print_rows(title: str, rows: Sequence[Row], console: Console) -> None:
    """A table of multiply-adds, one of bytes, and why rows are missing."""
    if not console.is_terminal:
        console = Console(file=console.file, width=200)  # a log is not wrapped
    bp = _backprop(rows)
    _, unit, word = _unit(bp.total)
    costs = [row.cost for row in rows if row.cost is not None]
    kinds = [k for i, k in enumerate(KINDS) if i < ALWAYS or any(getattr(c, k[0]) for c in costs)]
    headings = [*(heading for _, heading, *_ in kinds), "total", "of BP", "steps"]
    phase = ["phase"] if any(cost.phase for cost in costs) else []
    macs = _table(headings + phase)
    held = _table(["feedback", "errors", "signals", "held: joint", "replay", "eager"])
    for row in rows:
        for table, cells in ((macs, _macs(row.cost, kinds, bp)), (held, _sizes(row.cost))):
            table.add_row(escape(row.rule), escape(row.operator), *cells[: len(table.columns) - 2])
    titles = (f"{title}: multiply-adds of a training step, in {word} ({unit})", "bytes")
    for heading, table in zip(titles, (macs, held), strict=True):
        console.print(escape(heading), style="bold", soft_wrap=True, highlight=False)
        console.print(table)
    for row in rows:
        if row.refused:
            console.print(escape(f"{row.name}: {row.refused}"), soft_wrap=True, highlight=False)


def _table(headings: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("rule", "operator"):
        table.add_column(heading, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _macs(cost: Cost | None, kinds: Sequence[Any], bp: Cost) -> list[str]:
    if cost is None:
        return ["-"] * (len(kinds) + 4)
    size = _unit(bp.total)[0]
    counts = [_scaled(getattr(cost, kind), size) for kind, *_ in kinds]
    total = [_scaled(cost.total, size), f"{cost.total / bp.total:.2f}", str(cost.steps)]
    return [*counts, *total, _scaled(cost.phase, size)]


def _sizes(cost: Cost | None) -> list[str]:
    if cost is None:
        return ["-"] * 6
    held = (cost.held[name] for name, *_ in SCHEDULES)
    return [_bytes(n) for n in (cost.feedback_bytes, cost.traffic_bytes, cost.signal_bytes, *held)]


def _backprop(rows: Sequence[Row]) -> Cost:
    found = rows[0].cost
    assert found is not None
    return found


def _unit(largest: int) -> tuple[float, str, str]:
    """A unit in which the largest number is at least one."""
    units = ((1e12, "T", "trillions"), (1e9, "G", "billions"), (1e6, "M", "millions"))
    return next((unit for unit in units if largest >= unit[0]), (1e3, "k", "thousands"))


def _scaled(count: int | None, size: float) -> str:
    if not count:
        return "-" if count is None else "0"
    return f"{count / size:#.3g}" if count < 100 * size else f"{count / size:.0f}"


def _bytes(count: int | None) -> str:
    if count is None:
        return "-"
    size, unit = next(
        (u for u in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")) if count >= u[0]), (1, "B")
    )
    return f"{count / size:.0f} {unit}" if size == 1 else f"{count / size:.1f} {unit}"


def write_plot(path: Path, title: str, rows: Sequence[Row]) -> None:
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
        stream = io.BytesIO()
        figure.savefig(stream, format=path.suffix[1:], dpi=180)
    replace_file(path, lambda temporary: temporary.write_bytes(stream.getvalue()))


def _stacks(axes: Axes, costs: Sequence[Cost]) -> None:
    size, unit, _ = _unit(costs[0].total)
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
    axes.set_xlabel(f"multiply-adds of a step ({unit})")


def _held(axes: Axes, costs: Sequence[Cost]) -> None:
    size, unit, _ = _unit(costs[0].held["joint"] or 0)
    for name, colour, marker in SCHEDULES:
        found = [(at, cost.held[name]) for at, cost in enumerate(costs)]
        points = [(at, count / size) for at, count in found if count is not None]
        if points:
            rows, sizes = zip(*points, strict=True)
            axes.hlines(rows, 0, sizes, color=colour, lw=1.2, alpha=0.5)
            axes.plot(sizes, rows, marker, color=colour, ms=5, label=f"held: {name}")
    axes.set_xlim(0, 1.08 * axes.get_xlim()[1])
    axes.set_xlabel(f"activations held for the backward pass ({unit}B)")
