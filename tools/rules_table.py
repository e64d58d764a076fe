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
MEASURED = ROOT / "bench" / "results" / "all-rules-mlp" / "report.md"
# links stay whole
UNBROKEN = {"break_long_words": False, "break_on_hyphens": False}
PLACE = re.compile(r"(<!-- rules -->\n).*?(<!-- end of rules -->)", re.S)
MEASURED_LEGEND = {
    "MLP": "test accuracy in % on the embedded images, mean and standard deviation over 3 seeds, with rates picked on "
    "held-out images ([report](../bench/results/all-rules-mlp/report.md)); `dkp` and `kp` are their authors' forms there, "
    "the feedback of the chains began larger than the weights, and `dtp` had a decoder at its top. "
    "*not above Frozen*: it does not beat the control there by two standard errors, so it has not been shown to train "
    "hidden layers; [Recipes](recipes.md) has reasons and other settings."
}


def measured() -> dict[str, str]:
    """Test accuracy by the rule's label, with a note where the rule does not beat Frozen."""
    text = MEASURED.read_text()
    rows = re.findall(r"^\| ([^|]+?) \| (\d+\.\d ± \d+\.\d) \| \d+ \|", text, re.M)
    below = set(re.findall(r"^- (.+) does not beat Frozen", text, re.M))
    return {
        label: mean + (", *not above Frozen*" if label in below else "") for label, mean in rows
    }


def table() -> str:
    """The table as Markdown, and what its columns say."""
    found, counted, accuracy = facts(), costs(), measured()
    lines = [[*headings(cost=True)[:-1], "MLP, %", "Paper"]]
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
