"""What the docs site needs beyond MkDocs: pages of results, and docstrings as Markdown."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

BENCH = Path(__file__).parents[1] / "bench"
EQUATIONS = re.compile(r"^( *)\.\. math::(.*(?:\n(?:\1 +.*| *$))*)", re.M)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the tables of bench/ under results/."""
    for path in sorted([*BENCH.rglob("*.md"), *BENCH.rglob("*.json")]):
        name = path.relative_to(BENCH).as_posix().removeprefix("results/")
        name = "index.md" if name == "README.md" else name
        text = path.read_text().replace("](results/", "](").replace("](../docs/", "](../")
        files.append(File.generated(config, f"results/{name}", content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Lead links into bench/ to the pages made of it."""
    return markdown.replace("](../bench/README.md", "](results/index.md").replace(
        "](../bench/results/", "](results/"
    )


class PlainMarkup(griffe.Extension):
    """Turn the docstrings' mathematics and roles into Markdown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            text = EQUATIONS.sub(_display, obj.docstring.value)
            text = re.sub(r":math:`([^`]*)`", r"\\(\1\\)", text)
            obj.docstring.value = re.sub(r":\w+:`([^`]*)`", r"`\1`", text)


def _display(match: re.Match[str]) -> str:
    return "\\[\n" + textwrap.dedent(match[2]).strip() + "\n\\]\n\n"
