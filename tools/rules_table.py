"""Write the table of rules into the page that shows it: `feedbackward rules --cost`, and what was measured.

python tools/rules_table.py           # rewrite
python tools/rules_table.py --check   # exit 1 if a page is behind (the tests do this)
"""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path

from feedbackward.experiment.report.rules import (
    COST_LEGEND,
    COUNTED_ON,
    LEGEND,
    cells,
    costs,
    facts,
    headings,
)

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "choosing.md"
MEASURED = ROOT / "bench" / "results" / "all-rules-conv" / "report.md"
# links stay whole
UNBROKEN = {"break_long_words": False, "break_on_hyphens": False}
PLACE = re.compile(r"(<!-- rules -->\n).*?(<!-- end of rules -->)", re.S)
MEASURED_LEGEND = {
    "CIFAR-10": "test accuracy in % of the DKP authors' small CNN (three hidden layers) after five epochs on 8,000 images, "
    "with rates picked on held-out images by equal trials of one epoch "
    "([report](../bench/results/all-rules-conv/report.md)): mean and standard deviation over three seeds, or one seed, "
    "whose differences of two points say nothing. "
    "*not above Frozen*: it is not above the control there; [Recipes](recipes.md#every-rule-on-one-net) has more, and "
    "what the rules that this net cannot serve reach on an MLP."
}


def measured() -> dict[str, str]:
    """Test accuracy by the rule's label, with a note where it is not above Frozen's."""
    row = r"^\| ([^|]+?) \| (\d+\.\d)( ± \d+\.\d)? \| \d+ \|"
    # of a rule with several rows the last one counts: it has more seeds
    rows = {
        label: (float(mean), mean + spread)
        for label, mean, spread in re.findall(row, MEASURED.read_text(), re.M)
    }
    floor, _ = rows["Frozen"]
    return {
        label: shown + (", *not above Frozen*" if mean <= floor and label != "Frozen" else "")
        for label, (mean, shown) in rows.items()
    }


def table() -> str:
    """The table as Markdown, and what its columns say."""
    found, counted, accuracy = facts(), costs(), measured()
    lines = [[*headings(cost=True)[:-1], "CIFAR-10, %", "Paper"]]
    lines.append(["---"] * len(lines[0]))
    for name, row in found.items():
        *most, paper = cells(f"`{name}`", row | counted[name], cost=True)
        lines.append([*most, accuracy.get(row["label"], "not run"), paper])
    rows = [f"| {' | '.join(line)} |" for line in lines]
    legend = (LEGEND | COST_LEGEND | MEASURED_LEGEND).items()
    items = [
        textwrap.fill(f"- **{column}**: {meaning}", 118, subsequent_indent="  ", **UNBROKEN)
        for column, meaning in legend
    ]
    return "\n".join([*rows, "", *items, "", textwrap.fill(COUNTED_ON, 118, **UNBROKEN), ""])


def main() -> int:
    text = PAGE.read_text()
    fresh = PLACE.sub(lambda m: m[1] + table() + m[2], text)
    behind = fresh != text
    if behind and "--check" not in sys.argv:
        PAGE.write_text(fresh)
    print(f"{'behind' if '--check' in sys.argv else 'written'}: {PAGE}" if behind else "up to date")
    return int("--check" in sys.argv and behind)


if __name__ == "__main__":
    sys.exit(main())
