"""Runs of a bench, kept in a JSON file as they come: what is there is not run again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Kept:
    """The rows of the file; `keys` are the fields that say which run a row is."""

    def __init__(self, path: Path, keys: Sequence[str]) -> None:
        self.path, self.keys = path, keys
        self.rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
        self._done = {tuple(row[key] for key in keys) for row in self.rows}

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        return key in self._done

    def add(self, key: tuple[Any, ...], found: dict[str, Any]) -> None:
        """Write a row, after those that are there."""
        self.rows.append(dict(zip(self.keys, key, strict=True)) | found)
        self.path.write_text(json.dumps(self.rows, indent=1) + "\n")
