"""The docs site builds, needs no network, and lists every public name."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

import feedbackward as fb

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site that `make test` has just built, or one of the module's own."""
    if "SITE" in os.environ:
        return Path(os.environ["SITE"])
    out = tmp_path_factory.mktemp("site")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "NO_MKDOCS_2_WARNING": "1",
    }
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(out)]
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return out


def pages(site: Path) -> dict[str, str]:
    return {str(p.relative_to(site)): p.read_text() for p in site.rglob("*.html")}


@pytest.mark.nightly
def test_no_page_loads_anything_from_the_network(site: Path) -> None:
    for name, text in pages(site).items():
        assert not re.findall(r'<(?:script|img)[^>]* src="(?:https?:)?//[^"]*"', text), name
        assert not re.findall(r'<link[^>]*stylesheet[^>]* href="(?:https?:)?//[^"]*"', text), name


def test_equations_are_shown_without_a_script(site: Path) -> None:
    rules = pages(site)["api/rules/index.html"]
    assert rules.count("<math") > 100
    assert not any("arithmatex" in text for text in pages(site).values())


def test_every_public_name_is_on_an_api_page(site: Path) -> None:
    packed = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    listed = {line.split()[0] for line in zlib.decompress(packed).decode().splitlines()}
    for module in (fb, fb.errors, fb.operators, fb.parallel, fb.rules, fb.topologies):
        names = [name for name in module.__all__ if isinstance(getattr(module, name), type)]
        missing = {f"{module.__name__}.{name}" for name in names} - listed
        assert not missing


def test_search_finds_the_rules(site: Path) -> None:
    entries = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    texts = [entry["title"] + entry["text"] for entry in entries]
    for word in ("Kolen-Pollack", "renormalize_weights", "Delayed"):
        assert any(word in text for text in texts), word
