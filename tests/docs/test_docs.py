"""Every Python block of the README and the docs runs, page by page; every command line of them parses."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# a block of text right after a block of code is what the code prints
CODE_AND_OUTPUT = re.compile(
    r"(<!-- needs: .*? -->\n)?^```python\n(.*?)^```\n(?:```text\n(.*?)^```)?", re.M | re.S
)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.M | re.S)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_python_blocks_run_and_print_what_is_shown(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "docs"}
    for needs, code, shown in CODE_AND_OUTPUT.findall(page.read_text()):
        # of another package: tests/clients has these
        if needs:
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(page), "exec", dont_inherit=True), names)
        if shown:
            assert printed.getvalue() == shown


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "sh")], ids=lambda p: p.name)
def test_commands_parse(page: Path) -> None:
    from feedbackward.cli import COMMANDS
    from feedbackward.experiment.benchmark.subject import parse_cost
    from feedbackward.experiment.config.arguments import parse
    from feedbackward.experiment.config.schema import TrainConfig
    from feedbackward.experiment.grid.compare import parse_compare

    parsers = {
        "train": lambda words: parse(TrainConfig, words, "train").resolved(),
        "compare": parse_compare,
        "cost": parse_cost,
    }
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if not words or words[0] != "feedbackward":
                continue
            assert words[1] in COMMANDS, line
            if words[1] in parsers and "--help" not in words:
                parsers[words[1]](words[2:])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.nightly
def test_rules_tables_are_up_to_date() -> None:
    script = [sys.executable, str(ROOT / "tools" / "rules_table.py"), "--check"]
    assert subprocess.run(script, capture_output=True).returncode == 0, (
        "run: python tools/rules_table.py"
    )


def test_the_readme_is_one_page() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 100
    assert max(map(len, lines)) <= 120


def test_results_are_tables_and_small_files() -> None:
    files = [path for path in (ROOT / "bench" / "results").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".md", ".json"}
    assert sum(path.stat().st_size for path in files) < 1_000_000


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "yaml")], ids=lambda p: p.name)
def test_configurations_are_read(page: Path, tmp_path: Path) -> None:
    from feedbackward.experiment.grid.compare import parse_compare

    for block in blocks(page, "yaml"):
        path = tmp_path / "config.yaml"
        path.write_text(block)
        plan, _ = parse_compare(["--config", str(path)])
        assert plan.comparisons
