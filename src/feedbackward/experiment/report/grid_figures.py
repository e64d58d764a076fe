"""The figure of a grid's table: test accuracies of every rule over the columns."""

from __future__ import annotations

from statistics import fmean, stdev

from matplotlib.figure import Figure

from feedbackward.experiment.config.tasks import Measure, value_of
from feedbackward.experiment.report.drawing import Style, blank, drawing, styles
from feedbackward.experiment.report.plots import LINE, Drawn, drawn
from feedbackward.experiment.report.summary import Results, done_runs, measure_of_rule


def figures(results: Results) -> dict[str, list[Drawn | None]]:
    """By section, the figure of each of its tables."""
    found: dict[str, list[Drawn | None]] = {}
    with drawing():
        for number, section in enumerate(results["sections"]):
            for place, table in enumerate(section["tables"]):
                name = _measure(table).heading
                alt = f"{name} of every rule, {table['title']}; the table has the numbers."
                figure = drawn(name, alt, scores(table), f"t{number}-{place}")
                found.setdefault(section["name"], []).append(figure)
    return found


def looks(table: Results) -> dict[str, Style]:
    """A style for every label of a table, the same in each of its figures."""
    rules = {rule["label"]: rule for block in table["blocks"] for rule in block["rules"]}
    ordered = [rules[label] for label in table["labels"]]
    return dict(zip(table["labels"], styles({"rules": ordered}), strict=True))


def _measure(table: Results) -> Measure:
    rules = [rule for block in table["blocks"] for rule in block["rules"]]
    return measure_of_rule(rules[0] if rules else {})


def scores(table: Results) -> Figure | None:
    """Mean test result with its standard deviation, a line per rule; against backward steps where sites are the axis."""
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
            look = {"color": style.colour, "marker": style.marker, "label": label}
            axes.errorbar(xs, means, yerr=spreads, ls=joined, ms=5, lw=1.1, elinewidth=0.9, **look)  # type: ignore[arg-type]
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
    if len(name) > 9:
        return name.replace(" ", "\n", 1)
    return name.replace("-", "-\n", 1) if len(name) > 8 else name


def _point(
    block: Results, label: str, number: int, stepped: bool
) -> tuple[float, float, float] | None:
    rule = next((rule for rule in block["rules"] if rule["label"] == label), None)
    if rule is None or not (done := done_runs(rule)):
        return None
    found = [value for run in done if (value := value_of(run)) is not None]
    steps = (rule.get("cost") or {}).get("steps")
    if stepped and steps is None:
        return None
    spread = stdev(found) if len(found) > 1 else 0.0
    return float((steps if stepped else number) or 0), fmean(found), spread
