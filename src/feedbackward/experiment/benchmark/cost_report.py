"""Running `feedbackward cost`, and showing what it counted and measured: tables, JSON, figures."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from feedbackward.experiment.benchmark import counted
from feedbackward.experiment.benchmark.cases import make_cases
from feedbackward.experiment.benchmark.cost_plots import plot_counted, plot_measured
from feedbackward.experiment.benchmark.counted import count_rows
from feedbackward.experiment.benchmark.steps import Bench, Row, summary
from feedbackward.experiment.benchmark.units import ALWAYS, KINDS, SCHEDULES, scaled, sized, unit
from feedbackward.experiment.config.cost import CostConfig
from feedbackward.experiment.config.files import to_dict
from feedbackward.experiment.training.building import find_device
from feedbackward.experiment.training.checkpoint import replace_file
from feedbackward.experiment.training.environment import environment
from feedbackward.experiment.training.interrupts import InterruptedRunError, Interrupts
from feedbackward.experiment.training.progress import Progress
from feedbackward.measure.cost import Cost

COUNTED = """\
Forward, weight and input gradients: of the network; input gradients end at a cut. Signals: from the errors to the sites.
Learn B: gradients of the feedback weights. Aux.: networks of local losses. Phase: one call of feedback_step, which is not part
of the total. Norms, activations and the optimizer are not counted.
Steps: products in sequence from the output's error to the last signal. Errors: what travels along the edges.
Held: the most that autograd keeps for the backward pass at any time, in one backward pass (joint), in a replayed one, or within
the forward pass (eager); - if the rule or the sites do not allow it."""
MEASURED = """\
Step: zero gradients, forward, loss, backward, the feedback's own phase if a rule has one, SGD with momentum of all weights;
median of the rounds, in each of which every configuration takes one step. Of BP: relative to bp in the same round, median
(least-most). MACs of BP: the counted multiply-adds, for comparison. Activations: the most bytes that are alive in a step,
without weights, gradients, feedback, optimizer state and the batch."""


def run_cost(config: CostConfig) -> int:
    """Count, or measure; print a table per model, and write the files; returns the exit code.

    A signal stops a measurement between two steps. What was measured so far is printed and written,
    and the code is 128 + the signal.
    """
    for file in filter(None, (config.json, config.plot)):
        Path(file).parent.mkdir(parents=True, exist_ok=True)  # now rather than when all is done
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.stages:
        from feedbackward.experiment.benchmark.pipelines import simulate_stages

        return simulate_stages(config)
    return _measure(config) if config.measure else _count(config)


def _count(config: CostConfig) -> int:
    models, console = [], Console()
    for model in config.models:
        with Console(stderr=True).status(f"counting {model}") as status:
            rows = count_rows(config, model, lambda name: status.update(f"counting {name}"))
        print_counted(describe(config, model), rows, console)
        models.append(
            {"model": model, "rows": list(map(_counted_row, rows, [rows[0]] * len(rows)))}
        )
    print(COUNTED)
    if config.json:
        write_json(Path(config.json), document(config, models))
    if config.plot:
        plot_counted(Path(config.plot), describe(config, config.models[-1]), rows)
    return 0


def _measure(config: CostConfig) -> int:
    device = find_device(config.device)
    models, stopped, console = [], 0, Console()
    with Interrupts() as interrupts:
        for model in config.models:
            with Progress() as progress:
                bench = Bench(make_cases(config, model, device), device, progress, interrupts.check)
                try:
                    bench.measure(config.rounds)
                except InterruptedRunError as stop:
                    stopped = stop.signum
            rows = _with_macs(config, model, summary(bench.rows, config.batch))
            models.append({"model": model, "rows": rows})
            print_measured(describe(config, model), rows, bench.rows, console)
            if stopped:
                break
    print(MEASURED)
    if config.json:
        write_json(Path(config.json), document(config, models, device, bool(stopped)))
    if config.plot:
        plot_measured(Path(config.plot), models)
    return 128 + stopped if stopped else 0


def describe(config: CostConfig, model: str) -> str:
    """What all rows of a model have in common."""
    image = f"{config.channels}x{config.size}x{config.size}"
    parts = [model, f"batch {config.batch}", image, f"{config.classes} classes"]
    if config.measure:
        words = [word for word in ("compile", "channels_last") if getattr(config, word)]
        parts += [config.precision, *words, f"n = {config.rounds} rounds"]
    return ", ".join(parts)


def document(
    config: CostConfig,
    models: list[dict[str, Any]],
    device: torch.device | None = None,
    interrupted: bool = False,
) -> dict[str, Any]:
    """All that a result needs to be understood later: command, date, hardware, versions, settings, numbers."""
    found = environment(device or torch.device("cpu"))
    return {
        "command": found.pop("command"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "environment": found,
        "settings": to_dict(config),
        "interrupted": interrupted,
        "models": models,
    }


def _counted_row(row: counted.Row, first: counted.Row) -> dict[str, Any]:
    cost = {} if row.cost is None else row.cost.as_dict() | {"of_bp": _of_bp(row, first)}
    return {**cost, "rule": row.rule, "operator": row.operator, "refused": row.refused}


def _of_bp(row: counted.Row, first: counted.Row) -> float | None:
    if row.cost is None or first.cost is None:
        return None
    return row.cost.total / first.cost.total


def _with_macs(config: CostConfig, model: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The measured rows with their counted multiply-adds, relative to backprop's."""
    try:
        found = count_rows(config, model)
    except Exception:  # a net that cannot be counted can be measured all the same
        found = []
    known = {(row.rule, row.operator): _of_bp(row, found[0]) for row in found}
    return [row | {"macs_ratio": known.get((row["rule"], row["operator"]))} for row in rows]


def print_counted(title: str, rows: Sequence[counted.Row], console: Console) -> None:
    """A table of multiply-adds, one of bytes, and why rows are missing."""
    if not console.is_terminal:
        console = Console(file=console.file, width=200)  # a log is not wrapped
    bp = rows[0].cost
    assert bp is not None
    _, name, word = unit(bp.total)
    costs = [row.cost for row in rows if row.cost is not None]
    kinds = [k for i, k in enumerate(KINDS) if i < ALWAYS or any(getattr(c, k[0]) for c in costs)]
    headings = [*(heading for _, heading, *_ in kinds), "total", "of BP", "steps"]
    phase = ["phase"] if any(cost.phase for cost in costs) else []
    macs = _table(headings + phase)
    held = _table(["feedback", "errors", "signals", "held: joint", "replay", "eager"])
    for row in rows:
        for table, cells in ((macs, _macs(row.cost, kinds, bp)), (held, _sizes(row.cost))):
            table.add_row(escape(row.rule), escape(row.operator), *cells[: len(table.columns) - 2])
    titles = (f"{title}: multiply-adds of a training step, in {word} ({name})", "bytes")
    for heading, table in zip(titles, (macs, held), strict=True):
        console.print(escape(heading), style="bold", soft_wrap=True, highlight=False)
        console.print(table)
    for row in rows:
        if row.refused:
            console.print(escape(f"{row.name}: {row.refused}"), soft_wrap=True, highlight=False)


def _table(headings: Sequence[str], names: Sequence[str] = ("rule", "operator")) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in names:
        table.add_column(heading, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _macs(cost: Cost | None, kinds: Sequence[Any], bp: Cost) -> list[str]:
    if cost is None:
        return ["-"] * (len(kinds) + 4)
    size = unit(bp.total)[0]
    counts = [scaled(getattr(cost, kind), size) for kind, *_ in kinds]
    total = [scaled(cost.total, size), f"{cost.total / bp.total:.2f}", str(cost.steps)]
    return [*counts, *total, scaled(cost.phase, size)]


def _sizes(cost: Cost | None) -> list[str]:
    if cost is None:
        return ["-"] * 6
    held = (cost.held[name] for name, *_ in SCHEDULES)
    return [sized(n) for n in (cost.feedback_bytes, cost.traffic_bytes, cost.signal_bytes, *held)]


def print_measured(
    title: str, found: Sequence[dict[str, Any]], rows: Sequence[Row], console: Console
) -> None:
    """A table of times and memory, and below it what was refused and why."""
    if not console.is_terminal:
        console = Console(file=console.file, width=200)  # a log is not wrapped
    table = _table(
        ["step ms", "of BP", "", "images/s", "MACs of BP", "activations", "of BP", "feedback"],
        ("rule", "schedule", "operator"),
    )
    for row in found:
        if not row["refused"]:
            table.add_row(*(escape(cell) for cell in _measured_cells(row)))
    console.print(escape(title), style="bold", soft_wrap=True, highlight=False)
    console.print(table)
    for row, full in zip(found, rows, strict=True):
        if row["refused"] or row["note"]:
            what = f"refused: {row['refused']}" if row["refused"] else row["note"]
            console.print(escape(f"{full.case.label}: {what}"), soft_wrap=True, highlight=False)


def _measured_cells(row: dict[str, Any]) -> list[str]:
    time, ratio = row["ms"], row["time_ratio"]
    return [
        *(row[key] for key in ("rule", "schedule", "operator")),
        f"{time['median']:.1f}" if time else "-",
        f"{ratio['median']:.3f}" if ratio else "-",
        f"({ratio['min']:.3f}-{ratio['max']:.3f})" if ratio else "",
        f"{row['images_per_second']:.0f}" if time else "-",
        _ratio(row.get("macs_ratio")),
        sized(row["activation_bytes"]),
        _ratio(row["activation_ratio"]),
        sized(row["feedback_bytes"]),
    ]


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def write_json(path: Path, results: dict[str, Any]) -> None:
    """The results, whole or not at all."""
    text = json.dumps(results, indent=1) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
