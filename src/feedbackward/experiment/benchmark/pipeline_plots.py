"""Figures of pipelines: speed against stages and links, and a timeline in which one sees what waits."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from feedbackward.experiment.config.cost import CostConfig
from feedbackward.experiment.report.drawing import INK, drawing
from feedbackward.experiment.training.checkpoint import replace_file
from feedbackward.parallel.step import Event

# schedule: name, colour, marker, line
STYLES = {
    "1f1b": ("backprop, 1F1B", INK, "o", "-"),
    "zero-bubble": ("backprop, zero bubble", "#7d858e", "X", ":"),
    "star": ("direct feedback", "#1b7bbd", "s", "-"),
    "relays": ("relayed, 4 relays", "#d55e00", "^", "--"),
    "local": ("local losses", "#009e73", "D", "-."),
}
COLOURS = {"forward": "#9db8d2", "backward": "#d55e00", "wait": "#eceff2"}


def plot_stages(
    path: Path, config: CostConfig, found: Sequence[dict[str, Any]], links: Sequence[dict[str, Any]]
) -> None:
    """Steady speed relative to one process of backprop: against stages, and against the link's speed."""
    with drawing():
        figure = Figure(figsize=(9.6, 3.8), layout="constrained", facecolor="white")
        left, right = figure.subplots(1, 2, sharey=True)
        own = [entry for entry in found if entry["model"] == config.models[-1]]
        _lines(left, [entry["stages"] for entry in own], [entry["rows"] for entry in own])
        left.set(xlabel="stages", ylabel="speed, of one process", title=config.models[-1])
        _lines(right, [entry["link"] for entry in links], [entry["rows"] for entry in links])
        right.set(xlabel="link, Mbit/s", title=f"{max(config.stages)} stages")
        for axes in (left, right):
            axes.grid()
        left.legend(frameon=False, fontsize=8.5)
        _save(figure, path)


def _lines(axes: Axes, at: Sequence[float], rows: Sequence[Sequence[dict[str, Any]]]) -> None:
    for schedule, (name, colour, marker, line) in STYLES.items():
        speeds = [
            next(row["steady_speed"] for row in some if row["schedule"] == schedule)
            for some in rows
        ]
        axes.plot(at, speeds, line, color=colour, marker=marker, ms=4, lw=1.3, label=name)
    axes.set_xscale("log")
    if len(at) <= 8:
        axes.set_xticks(list(at), [f"{value:g}" for value in at])
        axes.minorticks_off()


def plot_timeline(path: Path, ranks: Sequence[Sequence[Event]]) -> None:
    """A row per rank: forwards, backwards and waits, with the numbers of the micro-batches."""
    with drawing():
        size = (9.6, 1.0 + 0.5 * len(ranks))
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        axes = figure.subplots()
        begin = min(event[3] for events in ranks for event in events)
        for rank, events in enumerate(ranks):
            for what, _, index, start, end in events:
                axes.barh(
                    rank, end - start, 0.8, left=start - begin, color=COLOURS[what], ec="white", lw=0.5
                )  # fmt: skip
                if what != "wait":
                    middle = (start + end) / 2 - begin
                    axes.text(middle, rank, str(index), ha="center", va="center", size=7)
        axes.set_yticks(range(len(ranks)), [f"rank {rank}" for rank in range(len(ranks))])
        axes.set(xlabel="seconds", ylim=(len(ranks) - 0.5, -0.5))
        for what, colour in COLOURS.items():
            axes.barh(0, 0, color=colour, label=what)
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
        _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    stream = io.BytesIO()
    figure.savefig(stream, format=path.suffix[1:], dpi=180)
    replace_file(path, lambda temporary: temporary.write_bytes(stream.getvalue()))
