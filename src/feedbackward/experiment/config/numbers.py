"""Numbers as one loader reads them, wherever they stand: in a file, in quotes, or behind a flag."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from feedbackward.errors import ConfigError
from feedbackward.experiment.config.files import parse_yaml


def takes_numbers(hint: Any) -> bool:
    """Whether a type admits numbers, or a list of them, and no text."""
    parts = {hint, *typing.get_args(hint)}
    inner = {arg for part in parts for arg in typing.get_args(part)}
    return bool({int, float} & (parts | inner)) and not {str, bool} & (parts | inner)


def with_numbers(hint: Any, value: Any, name: str) -> Any:
    """``value`` with every text in it read as a number where the type ``hint`` wants one.

    jsonargparse would read them too, but as YAML 1.1 does: 010 as 8 and 1:30 as 90.

    Raises:
        ConfigError: a text that is no number, naming the flag that it belongs to.
    """
    parts = [hint, *typing.get_args(hint)]
    if isinstance(value, Mapping):
        kind = next((part for part in parts if dataclasses.is_dataclass(part)), None)
        hints = typing.get_type_hints(kind) if kind else {}
        dot = f"{name}." if name else ""
        return {k: with_numbers(hints.get(k), v, f"{dot}{k}") for k, v in value.items()}
    if isinstance(value, list):
        inner = [typing.get_args(p)[0] for p in parts if typing.get_origin(p) is list]
        return [with_numbers(inner[0], v, name) for v in value] if inner else value
    if not isinstance(value, str) or not takes_numbers(hint):
        return value
    read = parse_yaml(value) if value.isprintable() else value
    if isinstance(read, str):
        wanted = "a number" if float in parts else "a whole number"
        flag = name.replace("_", "-")
        raise ConfigError(f"--{flag}: expected {wanted}, not {value}")
    return read
