"""Write the table of rules, as `feedbackward rules --format markdown` prints it, into the pages that show it.

python tools/rules_table.py           # rewrite
python tools/rules_table.py --check   # exit 1 if a page is behind (the tests do this)
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from pathlib import Path

from feedbackward.experiment.training.inspect import LEGEND, print_rules

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "docs" / "choosing.md",)
PLACE = re.compile(r"(<!-- rules -->\n).*?(<!-- end of rules -->)", re.S)


def table() -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        print_rules("markdown")
    rows = [line.rstrip() for line in out.getvalue().splitlines() if line.strip()]
    return "\n".join([*rows, "", LEGEND.replace("\n", " "), ""])


def main() -> int:
    behind = []
    for page in PAGES:
        text = page.read_text()
        fresh = PLACE.sub(lambda m: m[1] + table() + m[2], text)
        if fresh != text:
            behind.append(page.name)
            if "--check" not in sys.argv:
                page.write_text(fresh)
    print("written: " + ", ".join(behind) if behind else "up to date")
    return int("--check" in sys.argv and bool(behind))


if __name__ == "__main__":
    sys.exit(main())
