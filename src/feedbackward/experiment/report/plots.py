"""The figures of a comparison: learning curves, alignment heat maps and gradients' angles."""

import io
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from feedbackward.experiment.config.tasks import KINDS, measure_of
from feedbackward.experiment.report.drawing import (
    INK,
    WIDTH,
    Style,
    blank,
    drawing,
    height,
    name_ticks,
    styles,
    svg,
)
from feedbackward.experiment.report.heatmap import ANGLE, JACOBIAN, cells, grid, heat_map
from feedbackward.experiment.report.summary import (
    Results,
    done_runs,
    has_feedback,
    label_of,
    last_probe,
    lost_runs,
    mean_of,
    shown_runs,
    sites_of,
    summarise,
)

LINE = 0.18  # inches from one name to the next
# of each epoch, where it has them
CURVES = {
    **{f"validation_{m.key}": m.headed("Validation") for m in (k.measure for k in KINDS.values())},
    "train_loss": "Training loss",
}

Drawn = dict[str, Any]  # "title", "alt" and "svg"


def curves(results: Results, key: str, name: str) -> Figure | None:
    """Mean of `key` per epoch and rule over finished runs, band of one sample standard deviation."""
    figure = blank(max(3.0, _room(results)))
    return figure if _curves(figure.add_subplot(), results, key, name) else None


def _curves(axes: Axes, results: Results, key: str, name: str) -> bool:
    ends = []
    for rule, style in zip(results["rules"], styles(results), strict=True):
        done = done_runs(rule)
        for run in lost_runs(rule):
            _broken(axes, _series([run], key), style, run.get("status") == "diverged")
        epochs, values = _series(done, key)
        if not epochs:
            continue
        mean = np.nanmean(values, axis=0)
        marker = style.marker if len(epochs) <= 20 else ""
        axes.plot(epochs, mean, style.line, color=style.colour, marker=marker, ms=3.5, lw=1.6)
        if len(done) > 1:
            known = [column[np.isfinite(column)] for column in values.T]
            spread = np.array(
                [np.std(column, ddof=1) if len(column) > 1 else 0.0 for column in known]
            )
            axes.fill_between(
                epochs, mean - spread, mean + spread, color=style.colour, alpha=0.15, lw=0
            )
        ends.append((mean[-1], label_of(rule), style.colour))
    axes.set(xlabel="epoch", ylabel=name)
    axes.grid(axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    _end_labels(axes, ends)
    return bool(axes.lines)


def _broken(axes: Axes, series: tuple[list[int], np.ndarray], style: Style, diverged: bool) -> None:
    """A run that did not finish: thin, with a cross where it diverged."""
    epochs, values = series
    if epochs:
        axes.plot(epochs, values[0], color=style.colour, lw=0.8, alpha=0.8)
        if diverged:
            axes.plot(epochs[-1], values[0, -1], marker="x", color=style.colour, ms=7, mew=1.6)


def _series(runs: list[Results], key: str) -> tuple[list[int], np.ndarray]:
    """Epochs with a value of `key` in some run, and the values [runs, epochs], NaN where absent."""
    tables = [
        {e["epoch"]: e[key] for e in run.get("epochs") or [] if e.get(key) is not None}
        for run in runs
    ]
    epochs = sorted(set().union(*tables))
    return epochs, np.array(
        [[table.get(epoch, np.nan) for epoch in epochs] for table in tables], dtype=float
    )


def _room(results: Results) -> float:
    """Inches for a column of all rules' names."""
    return 0.6 + LINE * len(results["rules"])


def _end_labels(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Each curve's name at its end, pushed apart where they would overlap, and down again from above the axes."""
    low, high = axes.get_ylim()
    figure = axes.get_figure(root=True)
    assert figure is not None
    inches = figure.get_figheight() - 0.6
    gap, ends = LINE / inches * (high - low), sorted(ends)
    places = [value for value, _, _ in ends]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    for i in reversed(range(len(places))):
        places[i] = min(places[i], high - gap * (len(places) - 1 - i))
    for at, (_, label, colour) in zip(places, ends, strict=True):
        look: dict[str, Any] = {"color": colour, "va": "center", "weight": "bold"}
        axes.text(1.02, at, label, transform=axes.get_yaxis_transform(), **look)
    axes.set_ylim(low, high)


def tensors(results: Results) -> list[str]:
    """Parameter tensors with a measured angle, in forward order; without biases where there are over 60."""
    found: dict[str, None] = {}
    for rule in results["rules"]:
        for run in shown_runs(rule):
            found.update(dict.fromkeys(last_probe(run).get("parameters") or {}))
    names = list(found)
    return names if len(names) <= 60 else [name for name in names if not name.endswith("bias")]


def parameter_angles(results: Results) -> Figure | None:
    """A row per parameter tensor: each rule's mean angle to BP's gradient, a line from least to most."""
    names = tensors(results)
    shown = [
        pair
        for pair in zip(results["rules"], styles(results), strict=True)
        if has_feedback(pair[0])
    ]
    longest = max((len(label_of(rule)) for rule, _ in shown), default=0)
    columns = max(1, min(4, int(WIDTH / (0.5 + 0.08 * longest))))
    figure = blank(
        0.9
        + 0.2 * -(-len(shown) // columns)
        + max(height(len(names)), 0.03 * len(shown) * min(len(names), 60))
    )
    axes = figure.add_subplot()
    for index, (rule, style) in enumerate(shown):
        offset = 0.5 + 0.5 * ((index + 0.5) / len(shown) - 0.5)
        label = label_of(rule)
        for row, name in enumerate(names):
            probes = [
                (last_probe(run).get("parameters") or {}).get(name) or {}
                for run in shown_runs(rule)
            ]
            angles = [probe["angle"] for probe in probes if probe.get("angle") is not None]
            if angles:
                at, colour = row + offset, style.colour
                axes.plot([min(angles), max(angles)], [at, at], color=colour, lw=1.2)
                axes.plot(np.mean(angles), at, style.marker, color=colour, ms=4.5, label=label)
                label = "_shown already"
    if not axes.lines:
        return None
    axes.axvline(90, color=INK, lw=0.8, ls=":")
    axes.set(xlabel="angle to backprop's gradient (degrees)", ylim=(len(names), 0))
    axes.set_xlim(0, max(95, axes.get_xlim()[1]))
    axes.set_xticks(np.arange(0, axes.get_xlim()[1], 30))
    name_ticks(axes, names)
    axes.tick_params(axis="y", length=0)
    axes.grid()
    figure.legend(loc="outside upper center", ncols=columns, frameon=False)
    return figure


def picture(results: Results) -> bytes:
    """A PNG for a README: validation accuracy beside the angles of at most two rules with feedback."""
    shown = [rule for rule in results["rules"] if has_feedback(rule)]
    shown = [rule for rule in shown if np.isfinite(grid(rule, sites_of(rule), "angle")[1]).any()][
        :2
    ]
    named: list[str] = []
    with drawing():
        size = (5 + 3.1 * len(shown), max(3.7, 0.7 + _room(results)))
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        panels = figure.subplots(
            1, 1 + len(shown), squeeze=False, width_ratios=[1.35, *[1] * len(shown)]
        )[0]
        _curves(panels[0], results, "validation_accuracy", "validation accuracy (%)")
        panels[0].set_title("Learning curves", loc="left", weight="bold", size=10.5)
        for axes, rule in zip(panels[1:], shown, strict=True):
            sites, before = sites_of(rule), named
            cells(axes, grid(rule, sites, "angle"), ANGLE)
            axes.set_title(label_of(rule), loc="left", weight="bold", size=10.5)
            named = sites
            name_ticks(axes, [] if sites == before else sites, most=20)
        if shown:
            bar = figure.colorbar(ScalarMappable(ANGLE.norm, ANGLE.colours), ax=panels[-1])
            bar.set_label("angle to backprop")
            bar.outline.set_visible(False)
            bar.set_ticks([0, 45, 90, 135, 180], labels=["0°", "45°", "90°", "135°", "180°"])
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=180)
    return stream.getvalue()


def figures(results: Results, prefix: str = "") -> dict[str, list[Drawn]]:
    """The figures of a comparison by section; a section without data is empty. `prefix`: of their ids."""
    rules = results["rules"]
    sections: dict[str, list[Drawn]] = {
        name: [] for name in ("curves", "alignment", "parameters", "jacobian")
    }
    known = [row for row in summarise(results) if row["mean"] is not None]
    tested = ", ".join(f"{row['label']} {measure_of(row).in_words(row['mean'])}" for row in known)

    def add(section: str, title: str, alt: str, figure: Figure | None) -> None:
        made = drawn(title, alt, figure, f"{prefix}{section}{len(sections[section])}")
        sections[section] += [] if made is None else [made]

    with drawing():
        for key, name in CURVES.items():
            alt = f"{name} per epoch for each rule. On the test data: {tested}."
            add("curves", name, alt, curves(results, key, ""))
        for section, what in (("alignment", ANGLE), ("jacobian", JACOBIAN)):
            alt = f"{what.name} of each rule by depth, at the last probe; the heat maps have the values."
            add(section, "All rules at the last probe", alt, by_depth(results, what.key))
        for rule in filter(has_feedback, rules):
            label, sites = label_of(rule), sites_of(rule)
            for section, what in (("alignment", ANGLE), ("jacobian", JACOBIAN)):
                last = grid(rule, sites, what.key)[1][:, -1:].ravel()
                values = (what.text.format(v) for v in last)
                listed = ", ".join(map(" ".join, zip(sites, values, strict=False)))
                alt = f"{label}: {what.name} per site and epoch. At the last probe: {listed}."
                add(section, label, alt, heat_map(rule, sites, what))
        alt = "Angle between each rule's and backprop's gradient, per parameter tensor, at the last probe."
        add("parameters", "Angle per parameter tensor", alt, parameter_angles(results))
    return sections


def drawn(title: str, alt: str, figure: Figure | None, prefix: str) -> Drawn | None:
    """A figure as the page shows it. matplotlib escapes the text that it is given."""
    if figure is None:
        return None
    return {"title": title, "alt": alt, "svg": Markup(svg(figure, prefix))}


def by_depth(results: Results, key: str) -> Figure | None:
    """`key` of each rule's last probe over the depth of the net, mean over seeds: a line per rule, the input at the
    left. None for a single rule, whose heat map shows as much."""
    rules = [rule for rule in results["rules"] if has_feedback(rule)]
    figure = blank(max(2.6, 0.9 + LINE * len(rules)))
    axes = figure.add_subplot()
    looked = dict(zip(map(label_of, results["rules"]), styles(results), strict=True))
    most: list[str] = []
    for rule in rules:
        sites = sites_of(rule)
        values = [
            mean_of(
                (last_probe(r).get("sites") or {}).get(s, {}).get(key) for r in shown_runs(rule)
            )
            for s in sites
        ]
        known = [(i + 1, value) for i, value in enumerate(values) if value is not None]
        if known:
            (xs, ys), style = zip(*known, strict=True), looked[label_of(rule)]
            look = {"color": style.colour, "marker": style.marker, "label": label_of(rule)}
            axes.plot(xs, ys, style.line, ms=4, lw=1.4, **look)  # type: ignore[arg-type]
            most = max(most, sites, key=len)
    if len(axes.lines) < 2:
        return None
    _limits(axes, key, len(most))
    figure.legend(
        loc="outside right center", frameon=False, labelcolor="linecolor", handlelength=1.6
    )
    return figure


def _limits(axes: Axes, key: str, count: int) -> None:
    axes.set_xlabel("fed layer, from the input to the output")
    axes.set_xticks(range(1, count + 1, max(1, -(-count // 10))))
    if key == "angle":
        axes.axhline(90, color="#7d858e", lw=0.8, ls=":")
        axes.set_ylim(0, max(95, axes.get_ylim()[1]))
        axes.set_yticks(range(0, int(axes.get_ylim()[1]) + 1, 30))
    axes.grid(axis="y")
