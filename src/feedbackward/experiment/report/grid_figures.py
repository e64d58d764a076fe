"""The figures of a grid: accuracies of each table, and the angles and Jacobians of each comparison."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import stdev
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from feedbackward.experiment.report.drawing import Style, blank, drawing, styles, svg
from feedbackward.experiment.report.heatmap import ANGLE, heat_map
from feedbackward.experiment.report.plots import LINE, curves
from feedbackward.experiment.report.summary import (
    Results,
    done_runs,
    has_feedback,
    label_of,
    last_probe,
    mean_of,
    shown_runs,
    sites_of,
)

Drawn = dict[str, Any]  # "title", "alt" and "svg"


def figures(results: Results) -> dict[str, Any]:
    """`tables`: by section and number of the table its figure; `blocks`: by folder the figures of a comparison."""
    tables: dict[str, list[Drawn | None]] = {}
    blocks: dict[str, dict[str, list[Drawn]]] = {}
    with drawing():
        for number, section in enumerate(results["sections"]):
            for place, table in enumerate(section["tables"]):
                drawn = accuracies(table) or None
                prefix = f"t{number}-{place}"
                alt = f"Test accuracy of every rule, {table['title']}; the table has the numbers."
                tables.setdefault(section["name"], []).append(
                    _drawn("Test accuracy (%)", alt, drawn, prefix)
                )
                for block in table["blocks"]:
                    if block["folder"] not in blocks:
                        blocks[block["folder"]] = _of_block(block, f"b{len(blocks)}")
    return {"tables": tables, "blocks": blocks}


def _of_block(block: Results, prefix: str) -> dict[str, list[Drawn]]:
    by_layer = [
        ("Angle to backprop by layer, last probe (degrees)", by_site(block, "angle")),
        ("Cosine of B and the mean Jacobian by layer", by_site(block, "jacobian_cosine")),
    ]
    epochs = [("Held-out accuracy (%)", curves(block, "validation_accuracy", ""))]
    for rule in filter(has_feedback, block["rules"]):
        epochs.append(
            (f"{label_of(rule)}: angle by layer and epoch", heat_map(rule, sites_of(rule), ANGLE))
        )
    found: dict[str, list[Drawn]] = {}
    for kind, shown in (("layers", by_layer), ("epochs", epochs)):
        drawn = [
            _drawn(n, f"{block['title']}: {n}.", f, f"{prefix}-{kind}{i}")
            for i, (n, f) in enumerate(shown)
        ]
        found[kind] = [figure for figure in drawn if figure is not None]
    return found


def _drawn(name: str, alt: str, figure: Figure | None, prefix: str) -> Drawn | None:
    if figure is None:
        return None
    return {
        "title": name,
        "alt": alt,
        "svg": Markup(svg(figure, prefix)),
    }  # matplotlib escapes the text it is given


def looks(table: Results) -> dict[str, Style]:
    """A style for every label of a table, the same in each of its figures."""
    rules = {rule["label"]: rule for block in table["blocks"] for rule in block["rules"]}
    ordered = [rules[label] for label in table["labels"]]
    return dict(zip(table["labels"], styles({"rules": ordered}), strict=True))


def accuracies(table: Results) -> Figure | None:
    """Mean test accuracy with its standard deviation, a line per rule; against backward steps where sites are the axis."""
    stepped = any("sites" in block["point"] for block in table["blocks"])
    figure = blank(max(2.6, 0.9 + LINE * len(table["labels"])))
    axes = figure.add_subplot()
    for label, style in looks(table).items():
        points = [
            point
            for n, block in enumerate(table["blocks"])
            if (point := _point(block, label, n, stepped))
        ]
        if points:
            xs, means, spreads = zip(*sorted(points), strict=True)
            joined = style.line if not stepped or len({*xs}) > 1 else ""
            look: dict[str, Any] = {
                "color": style.colour,
                "marker": style.marker,
                "ms": 5,
                "lw": 1.1,
                "label": label,
            }
            axes.errorbar(xs, means, yerr=spreads, ls=joined, elinewidth=0.9, **look)
    if not axes.lines:
        return None
    if stepped:
        axes.set_xlabel("backward steps in sequence")
    else:
        axes.set_xticks(
            range(len(table["blocks"])), [_wrapped(block["column"]) for block in table["blocks"]]
        )
        axes.set_xlim(-0.4, len(table["blocks"]) - 0.6)
    axes.grid(axis="y")
    figure.legend(
        loc="outside right center", frameon=False, labelcolor="linecolor", handlelength=1.6
    )
    return figure


def _wrapped(name: str) -> str:
    return (
        name.replace(" ", "\n", 1)
        if len(name) > 9
        else name.replace("-", "-\n", 1)
        if len(name) > 8
        else name
    )


def _point(
    block: Results, label: str, number: int, stepped: bool
) -> tuple[float, float, float] | None:
    rule = next((rule for rule in block["rules"] if rule["label"] == label), None)
    if rule is None or not (done := done_runs(rule)):
        return None
    found = [run["test_accuracy"] for run in done]
    steps = (rule.get("cost") or {}).get("steps")
    if stepped and steps is None:
        return None
    return (
        float((steps if stepped else number) or 0),
        float(np.mean(found)),
        stdev(found) if len(found) > 1 else 0.0,
    )


def by_site(block: Results, key: str) -> Figure | None:
    """`key` of each rule's last probe over the depth of the net, mean over seeds: a line per rule, the input at the left."""
    rules = [rule for rule in block["rules"] if has_feedback(rule)]
    figure = blank(max(2.6, 0.9 + LINE * len(rules)))
    axes = figure.add_subplot()
    looked = dict(zip(map(label_of, block["rules"]), styles(block), strict=True))
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
            _line(axes, known, label_of(rule), looked)
            most = max(most, sites, key=len)
    if not axes.lines:
        return None
    _limits(axes, key, len(most))
    figure.legend(
        loc="outside right center", frameon=False, labelcolor="linecolor", handlelength=1.6
    )
    return figure


def _line(
    axes: Axes, points: list[tuple[int, float]], label: str, looked: Mapping[str, Style]
) -> None:
    style = looked[label]
    xs, ys = zip(*points, strict=True)
    axes.plot(
        xs, ys, style.line, color=style.colour, marker=style.marker, ms=4, lw=1.4, label=label
    )


def _limits(axes: Axes, key: str, count: int) -> None:
    axes.set_xlabel("fed layer, from the input to the output")
    axes.set_xticks(range(1, count + 1, max(1, -(-count // 10))))
    if key == "angle":
        axes.axhline(90, color="#7d858e", lw=0.8, ls=":")
        axes.set_ylim(0, max(95, axes.get_ylim()[1]))
        axes.set_yticks(range(0, int(axes.get_ylim()[1]) + 1, 30))
    axes.grid(axis="y")
