"""Configs as files and dicts: YAML in and out, unknown keys refused with the nearest names."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from feedbackward.errors import ConfigError
from feedbackward.experiment.config.schema import RuleEntry
from feedbackward.experiment.config.suggest import hint

C = TypeVar("C")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain dicts and lists, without unset values and what only concerns one invocation."""
    values = dataclasses.asdict(config)
    return _filled(
        {key: value for key, value in values.items() if key not in ("resume", "overwrite")}
    )


def write_yaml(config: Any) -> str:
    """The config as the text of a file that `--config` reads."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """YAML as people read it: 1e-3 and 010 are decimal, 1:30 and 2024-01-31 are text, and a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = (key_node.tag, key_node.value) if key_node.id == "scalar" else None
            if key is not None and key in seen and key_node.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"the key {key_node.value!r} stands twice in one mapping",
                    key_node.start_mark,
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node)).replace("_", "").lower()
        return int(text, {"0x": 16, "0o": 8, "0b": 2}.get(text.lstrip("+-")[:2], 10))


# YAML 1.1 has octal 010, numbers to the base of 60 (1:30), dates, floats that must have a dot and a signed exponent, and "="
_NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?(\d[\d_]*|0[xX][\da-fA-F_]+|0[oO][0-7_]+|0[bB][01_]+)",
    "tag:yaml.org,2002:float": r"[-+]?((\d[\d_]*\.[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.(inf|Inf|INF))"
    r"|\.(nan|NaN|NAN)",
}
_REPLACED = {*_NUMBERS, "tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:value"}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag not in _REPLACED]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(
        _tag, re.compile(f"^({_pattern})$", re.ASCII), list("-+0123456789.")
    )
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
MOST_VALUES = 100_000  # in one file, repeated ones counted


def parse_yaml(text: str | bytes) -> Any:
    """The value that a YAML text holds. Raises ConfigError where it is none, a key stands twice, or it has no end."""
    try:
        value = yaml.load(text, _Loader)
        _count(value, {})
        return value
    except yaml.reader.ReaderError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"this is no valid YAML: {reason}: save it as UTF-8 text") from error
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        raise ConfigError(f"this is no valid YAML: {' '.join(str(error).split())}") from error


def _count(value: Any, known: dict[int, int]) -> int:
    """How many values there are in one. Raises ValueError for one that holds itself, or for too many."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) in known:
        if not known[id(value)]:
            raise ValueError("an alias (*) stands within what it stands for")
        return known[id(value)]
    known[id(value)] = 0
    parts = [*value.values()] if isinstance(value, dict) else value
    known[id(value)] = 1 + sum(_count(part, known) for part in parts)
    if known[id(value)] > MOST_VALUES:
        raise ValueError(f"its aliases (*) stand for more than {MOST_VALUES:,} values")
    return known[id(value)]


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError where the file is missing or is no such YAML."""
    try:
        values = parse_yaml(path.read_bytes())
    except (OSError, ConfigError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"cannot read the config file {path}: {reason}") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"the config file {path} must hold 'key: value' lines, not a {type(values).__name__}"
        )
    return values


def from_dict(kind: type[C], values: Mapping[str, Any], where: str = "the config") -> C:
    """Make a config dataclass from nested mappings, refusing unknown keys."""
    check_keys(kind, values, where)
    hints = typing.get_type_hints(kind)
    made = {}
    for key, value in values.items():
        if value is None and type(None) not in typing.get_args(hints[key]):
            raise ConfigError(f"{where} has no value for '{key}': give one, or leave the key out")
        if dataclasses.is_dataclass(hints[key]):
            value = _nested(typing.cast(type, hints[key]), key, value, where)
        elif key == "rules" and isinstance(value, list):
            value = [from_dict(RuleEntry, v, where) if isinstance(v, Mapping) else v for v in value]
        made[key] = value
    return kind(**made)


def _nested(kind: type, key: str, value: Any, where: str) -> Any:
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"in {where} '{key}' is {value!r}, which are no keys and values: see {key}.* in --help"
        )
    return from_dict(kind, value, where)


def check_keys(kind: type, values: Mapping[str, Any], where: str, prefix: str = "") -> None:
    """Raise ConfigError for a key, at any depth, that the dataclass ``kind`` has no field for."""
    hints = typing.get_type_hints(kind)
    for key, value in values.items():
        if key not in hints:
            raise ConfigError(f"{where} has an unknown key '{prefix}{key}': {_meant(key, hints)}")
        if dataclasses.is_dataclass(hints[key]) and isinstance(value, Mapping):
            check_keys(typing.cast(type, hints[key]), value, where, f"{prefix}{key}.")
        if key == "rules" and isinstance(value, list):
            for entry in value:
                if isinstance(entry, Mapping):
                    check_keys(RuleEntry, entry, where, "rules.")


def _meant(key: Any, hints: Mapping[str, Any]) -> str:
    """What an unknown key may stand for: the same key inside another one, or a near name."""
    inner = [
        f"'{name}.{key}'"
        for name, kind in hints.items()
        if dataclasses.is_dataclass(kind) and key in typing.get_type_hints(kind)
    ]
    if inner:
        return f"did you mean {' or '.join(inner)}?"
    return hint(str(key), hints)


def differences(
    first: Mapping[str, Any], second: Mapping[str, Any], prefix: str = ""
) -> Iterator[str]:
    """``key: value in first -> value in second`` for every leaf that differs."""
    for key in [*first, *(k for k in second if k not in first)]:
        a, b = first.get(key), second.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}: {a} -> {b}"


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """`first` with what `second` sets; nested mappings are merged, all else is replaced."""
    both = dict(first)
    for key, value in second.items():
        old = both.get(key)
        both[key] = (
            merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
        )
    return both


def nested(key: str, value: Any) -> dict[str, Any]:
    """`data.name` and a value as `{data: {name: value}}`."""
    for part in reversed(str(key).split(".")):
        value = {part: value}
    return dict(value)


def _filled(value: Any) -> Any:
    """Without None and empty mappings, which mean "the default"."""
    if isinstance(value, dict):
        pairs = ((key, _filled(item)) for key, item in value.items())
        return {key: item for key, item in pairs if item is not None and item != {}}
    return [_filled(item) for item in value] if isinstance(value, list) else value
