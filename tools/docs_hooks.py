"""What the docs site needs beyond MkDocs: pages of results, the notebook, docstrings as Markdown, and MathML.

Browsers show MathML themselves, so the site needs no script for its equations and no network.
"""

from __future__ import annotations

import base64
import html
import json
import re
import textwrap
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import feedbackward

BENCH = Path(__file__).parents[1] / "bench"
NOTEBOOK = BENCH.parent / "examples" / "first_look.ipynb"
EQUATIONS = re.compile(r"^( *)\.\. math::(.*(?:\n(?:\1 +.*| *$))*)", re.M)
TEX = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the tables of bench/ under results/, and the notebook."""
    for path in sorted([*BENCH.rglob("*.md"), *BENCH.rglob("*.json")]):
        name = path.relative_to(BENCH).as_posix().removeprefix("results/")
        name = "index.md" if name == "README.md" else name
        text = path.read_text().replace("](results/", "](").replace("](../docs/", "](../")
        files.append(File.generated(config, f"results/{name}", content=text))
    text, pictures = notebook_page(NOTEBOOK)
    files.append(File.generated(config, "first_look.md", content=text))
    for name, content in pictures.items():
        files.append(File.generated(config, name, content=content))
    return files


def notebook_page(path: Path) -> tuple[str, dict[str, bytes]]:
    """An executed notebook as Markdown, and its pictures by name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        printed = "".join(
            "".join(o["text"]) for o in cell.get("outputs", []) if o["output_type"] == "stream"
        )
        parts += [f"```text\n{printed}```"] if printed else []
        for data in (o["data"] for o in cell.get("outputs", []) if "data" in o):
            if "image/png" in data:
                name = f"{path.stem}-{len(pictures)}.png"
                pictures[name] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![What the code above draws]({name})")
            elif "text/html" in data:
                parts.append("".join(data["text/html"]))
            else:
                parts.append("```text\n" + "".join(data["text/plain"]) + "\n```")
    return "\n\n".join(parts), pictures


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Lead links into bench/, and to the notebook, to the pages made of them."""
    return (
        markdown.replace("](../bench/README.md", "](results/index.md")
        .replace("](../bench/results/", "](results/")
        .replace("](../examples/first_look.ipynb", "](first_look.md")
    )


def on_page_content(content: str, **_: Any) -> str:
    """Turn TeX into MathML. Raises ValueError for a command that the converter does not know."""
    return TEX.sub(_mathml, content)


class PlainMarkup(griffe.Extension):
    """Turn the docstrings' mathematics and roles into Markdown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            text = EQUATIONS.sub(_display, obj.docstring.value)
            text = re.sub(r":math:`([^`]*)`", r"\\(\1\\)", text)
            text = re.sub(r":(?:class|func):`(\w+)`", _link, text)
            text = re.sub(r":\w+:`([^`]*)`", r"`\1`", text)
            # the plural is what griffe shows as code
            text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.M)
            obj.docstring.value = _options(text)


def _link(role: re.Match[str]) -> str:
    """A link to the public path of a name, or the name as code if it has none."""
    name = role[1]
    for home in (feedbackward, feedbackward.operators, feedbackward.rules, feedbackward.topologies):
        if name in home.__all__:
            return f"[`{name}`][{home.__name__}.{name}]"
    return f"`{name}`"


def _display(match: re.Match[str]) -> str:
    return "\\[\n" + textwrap.dedent(match[2]).strip() + "\n\\]\n\n"


def _options(text: str) -> str:
    """Make a list of the lines `option: what it means`, which are a paragraph in the source."""
    lines: list[str] = []
    for line in text.split("\n"):
        found = re.match(r"([a-z]\w*(?:, [a-z]\w*)*): ", line)
        if found:
            shown = ", ".join(f"`{name}`" for name in found[1].split(", "))
            if not (lines and lines[-1].startswith(("- ", "    "))):
                lines.append("")
            line = f"- {shown}: {line[found.end() :]}"
        lines.append(line)
    return "\n".join(lines)


def _mathml(match: re.Match[str]) -> str:
    tex = html.unescape(match[2]).strip()
    made = convert(tex, display="block" if match[1] == "div" else "inline")
    if "\\" in made:
        raise ValueError(f"the docs' equations know no such command: {tex}")
    return made
