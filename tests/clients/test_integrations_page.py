"""The blocks of docs/integrations.md that need a package of their own run, each after those that need none."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from client_nets import ASKED, needed

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
SECTIONS = re.split(r"^## (.*)\n", PAGE.read_text(), flags=re.M)[1:]
BLOCK = re.compile(r"(?:<!-- needs: (.*?) -->\n)?^```python\n(.*?)^```", re.M | re.S)


def blocks(text: str) -> list[tuple[str, str]]:
    """What a block needs, and its code."""
    return BLOCK.findall(text)


WITH = {
    title: text
    for title, text in zip(SECTIONS[::2], SECTIONS[1::2], strict=True)
    if any(needs for needs, _ in blocks(text))
}


@pytest.mark.clients
@pytest.mark.skipif(not ASKED, reason="slow: `make clients` runs it")
@pytest.mark.parametrize("title", WITH)
def test_a_section_runs(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = blocks(WITH[title])
    for package in {name for needs, _ in own for name in needs.split(", ") if name}:
        needed(package)
    before = [code for needs, code in blocks(PAGE.read_text()) if not needs]
    names: dict[str, object] = {"__name__": "docs"}
    for code in (*before, *(code for _, code in own if code not in before)):
        exec(compile(code, str(PAGE), "exec", dont_inherit=True), names)


def test_the_blocks_are_short() -> None:
    """Ten lines of code, besides imports."""
    for title, text in WITH.items():
        for _, code in blocks(text):
            lines = [line for line in code.splitlines() if line and "import" not in line]
            assert len(lines) <= 10, title
