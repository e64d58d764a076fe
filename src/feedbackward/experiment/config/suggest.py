"""Look-ups by name whose errors suggest the nearest names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

from feedbackward.errors import ConfigError

T = TypeVar("T")


def hint(name: str, known: Iterable[str]) -> str:
    """``did you mean 'a' or 'b'? known: a, b, c``, for the end of an error message."""
    known = list(known)
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    near.sort(
        key=lambda n: sorted(n) != sorted(name.lower())
    )  # letters in another order come first
    if near:
        return f"did you mean {' or '.join(repr(n) for n in near)}?"
    return f"known: {', '.join(known)}"


def choose(kind: str, name: str, table: Mapping[str, T]) -> T:
    """``table[name]``. Raises ConfigError with the nearest names where there is none."""
    if name not in table:
        raise ConfigError(f"unknown {kind} '{name}': {hint(name, table)}")
    return table[name]
