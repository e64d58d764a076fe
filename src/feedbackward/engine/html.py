"""Tables for notebooks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape


def html_table(heads: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> str:
    """A table in HTML. Cells are texts; numbers are set to the right."""
    above = f"<caption>{escape(title)}</caption>" if title else ""
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    top = "".join(f"<th>{escape(head)}</th>" for head in heads)
    return f"<table>{above}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _cell(text: str) -> str:
    numeric = re.fullmatch(r"-?[\d.,]+(e[+-]\d+)?|nan", text)
    return f'<td style="text-align: {"right" if numeric else "left"}">{escape(text)}</td>'
