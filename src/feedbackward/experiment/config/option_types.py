"""The types of a rule's and an operator's options: what is written for one must be of the type that it has."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from typing import Any

from feedbackward.errors import ConfigError

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a name, in quotes if it looks like something else",
    types.NoneType: "null",
}


def check_types(kind: type, options: Mapping[str, Any], whose: str) -> None:
    """Refuse the first option whose value is of another type than the dataclass ``kind`` says.

    Fields of other than simple types (operators, rules) are left to those who read them.

    Raises:
        ConfigError: naming the option, its value and what it takes.
    """
    try:
        hints = typing.get_type_hints(kind)
    except Exception:  # annotations of somebody else's rule, which may name what is not there
        return
    for key, value in options.items():
        wanted = _simple(hints.get(key))
        if wanted and not any(_fits(value, one) for one in wanted):
            words = " or ".join(_WORDS.get(one, repr(one)) for one in wanted)
            raise ConfigError(f"the option '{key}' of {whose} is {value!r}: it must be {words}")


def _simple(hint: Any) -> list[Any]:
    """The simple types and literal values that a hint admits; none where it admits others too."""
    if hint in _WORDS:
        return [hint]
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return list(parts)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        each = [_simple(part) for part in parts]
        return [one for found in each for one in found] if all(each) else []
    return []


def _fits(value: Any, wanted: Any) -> bool:
    if wanted is float:
        # NaN is no number either
        return type(value) in (int, float) and value == value
    return type(value) is wanted if isinstance(wanted, type) else value == wanted
