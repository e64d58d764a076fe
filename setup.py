"""The README as package indexes show it, where a link must lead to the repository. All else is in pyproject.toml.

`REPOSITORY_URL` is the repository's address; GitHub's workflows say theirs. Without one the links become plain text.
"""

import os
import re
from pathlib import Path

from setuptools import setup

GITHUB = "{GITHUB_SERVER_URL}/{GITHUB_REPOSITORY}"
HOME = os.environ.get("REPOSITORY_URL") or (
    GITHUB.format_map(os.environ) if "GITHUB_REPOSITORY" in os.environ else ""
)
RELATIVE = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)]*)\)")


def absolute(link: re.Match) -> str:
    """A link into the repository, or what it says where there is no address for it."""
    picture, text, path = link.groups()
    if not HOME:
        return "" if picture else text
    return f"{picture}[{text}]({HOME}/{'raw' if picture else 'blob'}/HEAD/{path})"


setup(
    long_description=RELATIVE.sub(absolute, Path("README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    project_urls={"Repository": HOME} if HOME else {},
)
