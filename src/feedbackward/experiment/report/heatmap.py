"""Alignment heat maps: sites x probed epochs, with BP's own gradient norm beside them."""

from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullLocator

from feedbackward.experiment.report.drawing import INK, blank, height, name_ticks
from feedbackward.experiment.report.summary import FLOOR, Results, shown_runs


class Map(NamedTuple):
    """What a heat map shows: the key of a probe, its colours, and how a value is written in its cell."""

    key: str
    name: str
    colours: str
    norm: Normalize
    text: str


ANGLE = Map("angle", "angle to backprop (degrees)", "RdBu_r", Normalize(0, 180), "{:.0f}")
JACOBIAN = Map(
    "jacobian_cosine", "cosine of B and the Jacobian", "RdBu", Normalize(-1, 1), "{:.2f}"
)


def grid(rule: Results, sites: list[str], key: str) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Probed epochs, mean of `key` and smallest BP gradient norm over finished runs, both [sites, epochs].

    Where no run has finished, the unfinished ones are shown instead. NaN where nothing was measured.
    """
    probes: dict[int, list[Results]] = {}
    for run in shown_runs(rule):
        for probe in run.get("alignment") or []:
            probes.setdefault(probe["epoch"], []).append(probe.get("sites") or {})
    epochs = sorted(probes)
    means, norms = np.full((2, len(sites), len(epochs)), np.nan)
    for row, site in enumerate(sites):
        for column, epoch in enumerate(epochs):
            entries = [probe.get(site) or {} for probe in probes[epoch]]
            if values := [entry[key] for entry in entries if entry.get(key) is not None]:
                means[row, column] = np.mean(values)
            if values := [
                entry["bp_norm"] for entry in entries if entry.get("bp_norm") is not None
            ]:
                norms[row, column] = min(values)
    return epochs, means, norms


def heat_map(rule: Results, sites: list[str], what: Map) -> Figure | None:
    """Sites (input on top) x probed epochs; for angles also BP's last gradient norm. None without a value."""
    epochs, values, norms = grid(rule, sites, what.key)
    if not np.isfinite(values).any():
        return None
    with_norm = what is ANGLE and np.isfinite(norms).any()
    figure = blank(0.85 + height(len(sites)))
    widths = [3.4, 1] if with_norm else [1]
    panels = figure.subplots(1, len(widths), squeeze=False, sharey=True, width_ratios=widths)[0]
    cells(panels[0], (epochs, values, norms), what)
    name_ticks(panels[0], sites)
    if with_norm:
        _norms(panels[1], norms[:, -1])
    return figure


def cells(axes: Axes, data: tuple[list[int], np.ndarray, np.ndarray], what: Map) -> None:
    """Draw `data`, as `grid` gives it; values are printed when there are at most ten columns."""
    epochs, values, norms = data
    colours = matplotlib.colormaps[what.colours]
    columns, rows = len(epochs), len(values)
    many = values.size > 400  # a picture instead of thousands of paths
    edges: dict[str, Any] = (
        {"rasterized": True} if many else {"edgecolor": "white", "linewidth": 0.6}
    )
    axes.pcolormesh(np.ma.masked_invalid(values), cmap=colours, norm=what.norm, **edges)
    axes.set(xlabel="epoch", xlim=(0, columns), ylim=(rows, 0))
    axes.spines[["left", "bottom"]].set_visible(False)
    step = max(1, -(-columns // 10))
    axes.set_xticks(np.arange(0, columns, step) + 0.5, [str(epoch) for epoch in epochs[::step]])
    axes.tick_params(length=0)
    for row, column in np.argwhere(norms < FLOOR):
        axes.add_patch(Rectangle((column, row), 1, 1, fill=False, hatch="////", lw=0))
    if columns <= 10 and not many:
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                ink = _on(colours, what.norm(value))
                text = what.text.format(value)
                axes.text(
                    column + 0.5, row + 0.5, text, ha="center", va="center", color=ink, size=8.5
                )


def _on(colours: Colormap, level: Any) -> str:
    """Black or white, whichever is easier to read on the colour."""
    red, green, blue, _ = colours(float(level))
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.55 else "black"


def _norms(axes: Axes, norms: np.ndarray) -> None:
    """BP's gradient norm per site, on a log scale, with the floor below which an angle means nothing."""
    known = np.clip(norms, 1e-12, None)
    axes.plot(known, np.arange(len(norms)) + 0.5, "o", color=INK, ms=3.5)
    axes.set_xscale("log")
    low, high = np.nanmin(known), np.nanmax(known)
    axes.set_xlim(min(low / 3, FLOOR / 3 if low < 100 * FLOOR else low), high * 3)
    axes.axvline(FLOOR, color="#d55e00", lw=1, ls="--")
    axes.set_xlabel("BP's norm,\nlast probe", size=8)
    axes.xaxis.set_major_locator(LogLocator(numticks=3))
    axes.xaxis.set_major_formatter(
        lambda norm, _: f"{norm:.0e}".replace("e-0", "e-").replace("e+0", "e")
    )
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y")
