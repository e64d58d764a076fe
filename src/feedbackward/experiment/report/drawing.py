"""How every figure of a report is drawn: a style per rule, axes in the page's colours, small inline SVG.

Axes and letters are drawn in `INK`, which `svg` turns into CSS's currentColor: the page's light or dark text.
"""

import io
import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from feedbackward.experiment.report.summary import Results

INK = "#1f2328"
WIDTH = 4.5  # inches: on a 360 px phone 9.5 pt letters are still about 9 px
STYLE: Any = {  # matplotlib types the keys of its settings one by one
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "hatch.color": "#a07a00",
    "hatch.linewidth": 0.6,
    "grid.color": INK,
    "grid.alpha": 0.13,
    "grid.linewidth": 0.6,
    "text.parse_math": False,  # a site's name may hold a dollar sign
    "svg.fonttype": "none",
    "svg.hashsalt": "feedbackward",
}


class Style(NamedTuple):
    """How one rule looks in every figure: colour, marker and dash, so that colour is never the only cue."""

    colour: str
    marker: str
    line: str


RESERVED = {
    "bp": Style(INK, "o", "-"),
    "dkp": Style("#1b7bbd", "s", "-"),
    "dfa": Style("#d55e00", "^", "--"),
    "frozen": Style("#7d858e", "X", ":"),
}
COLOURS, MARKERS, LINES = (
    ("#009e73", "#b0568f", "#a07a00", "#5a6acf"),
    "DvPd<>ph*",
    ("-", "--", "-."),
)
OTHERS = [  # 4 colours and 9 markers: no two of 36 rules have the same of both
    Style(COLOURS[i % 4], MARKERS[i % 9], LINES[i // 4 % 3]) for i in range(36)
]


def styles(results: Results) -> list[Style]:
    """One style per rule, in order; well-known rules keep theirs from page to page."""
    free, taken, chosen = itertools.cycle(OTHERS), set(), []
    for rule in results.get("rules") or []:
        name = rule.get("rule")
        chosen.append(RESERVED[name] if name in RESERVED and name not in taken else next(free))
        taken.add(name)
    return chosen


@contextmanager
def drawing() -> Iterator[None]:
    """The figures' settings, without touching the caller's."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def blank(height: float) -> Figure:
    """An empty figure, as wide as a card of the page and `height` inches high."""
    return Figure(figsize=(WIDTH, height), layout="constrained")


def svg(figure: Figure, prefix: str) -> str:
    """The figure as an inline <svg> without header or namespaces; its ids start with `prefix`."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL
    )
    text = re.sub(r' (?:xmlns(?::xlink)?|version)="[^"]*"', "", text)
    text = re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', text, count=1
    )

    def shorten(tag: re.Match[str]) -> str:
        prefixed = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", tag[0]).replace(
            INK, "currentColor"
        )
        return re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", prefixed)

    return re.sub(r"\n\s*", "\n", re.sub(r"<[^>]+>", shorten, text))


def height(rows: int) -> float:
    """Inches for so many labelled rows: easy when few, dense when many, never more than 60 labels high."""
    return 0.25 * max(rows, 3) if rows <= 24 else 0.14 * min(max(rows, 43), 60)


def name_ticks(axes: Axes, names: list[str], most: int = 60) -> None:
    """Names beside rows 0.5, 1.5, ...; every second, third, ... where there are more than `most`."""
    step = max(1, -(-len(names) // most))
    axes.set_yticks(
        np.arange(0, len(names), step) + 0.5, [_short(name) for name in names[::step]], size=8.5
    )


def _short(name: str) -> str:
    """The last parts of a dotted name, so that labels leave room for the data."""
    short = name
    while len(short) > 24 and "." in short:
        short = short.split(".", 1)[1]
    return ("" if short == name else "…") + (short if len(short) <= 24 else short[:23] + "…")
