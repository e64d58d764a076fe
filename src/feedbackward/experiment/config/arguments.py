"""Command-line arguments and config files to a config dataclass, through jsonargparse.

Every field is a flag (``--forward.lr``), and dashes may stand for underscores. What is written here comes
before jsonargparse: short names, lists without brackets, switches without values, errors that suggest names.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import ArgumentParser

from feedbackward.errors import ConfigError
from feedbackward.experiment.config.files import check_keys, from_dict, read_yaml

C = TypeVar("C")

SHORT = {
    "data": "data.name",
    "data_root": "data.root",
    "lr": "forward.lr",
    "feedback_lr": "feedback.lr",
    "search": "search.run",
}
SHIPPED = Path(__file__).parent / "comparisons"


def parse(kind: type[C], arguments: Sequence[str], command: str, about: str) -> C:
    """The config that the arguments describe; ``--config`` first, then the flags, whatever their order.

    Raises:
        ConfigError: an unknown or repeated flag or key, a missing file, or a value of another type.
    """
    parser = _parser(kind, command, about)
    tokens = list(_normalised(arguments, kind, parser))
    tokens.sort(key=lambda token: not token.startswith("--config="))  # stable: flags win over files
    for token in tokens:
        if token.startswith("--config="):
            file = Path(token.partition("=")[2])
            check_keys(kind, read_yaml(file), f"the config file {file}")
    try:
        given = parser.parse_args(tokens, defaults=False).as_dict()
    except argparse.ArgumentError as error:
        raise ConfigError(_sentence(error)) from error
    given.pop("config", None)
    return from_dict(kind, given, "the command line")


def validated(kind: type[C], values: Mapping[str, Any], where: str) -> C:
    """The config that nested mappings describe, as `parse` would read it from a file.

    Raises:
        ConfigError: an unknown key, or a value of another type.
    """
    check_keys(kind, values, where)
    parser = _parsers(kind)  # type: ignore[arg-type]
    try:
        given = parser.parse_object(copy.deepcopy(dict(values)), defaults=False).as_dict()
    except argparse.ArgumentError as error:
        raise ConfigError(f"{where}: {_sentence(error)}") from error
    given.pop("config", None)
    return from_dict(kind, given, where)


@functools.cache
def _parsers(kind: type) -> ArgumentParser:
    return _parser(kind, "", "")


def _parser(kind: type, command: str, about: str) -> ArgumentParser:
    usage = f"{command} [--config FILE] [--option value ...]"
    parser = ArgumentParser(
        prog=command, usage=usage, description=about, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument(
        "--config", action="config", help="a YAML file, or the name of a shipped one: " + _shipped()
    )
    parser.add_class_arguments(kind, None)
    for action in (
        parser._actions
    ):  # a nested dataclass also gets a flag of its own, which would only confuse
        if action.dest in typing.get_type_hints(kind) and dataclasses.is_dataclass(
            _hints(kind).get(action.dest)
        ):
            action.help = (
                f"short for --{SHORT[action.dest]}" if action.dest in SHORT else argparse.SUPPRESS
            )
    return parser


def _normalised(arguments: Sequence[str], kind: type, parser: ArgumentParser) -> Iterator[str]:
    """Every flag as ``--full_name=value``."""
    hints, flags = (
        _hints(kind),
        {option for action in parser._actions for option in action.option_strings},
    )
    rest = list(arguments)
    while rest:
        token = rest.pop(0)
        if token in ("-h", "--help") or token.startswith("--print_config"):
            yield token
            continue
        if not token.startswith("--"):
            raise ConfigError(
                f"unexpected argument '{token}': options start with --, as in --model vgg6"
            )
        name, equals, value = token[2:].partition("=")
        name = name.replace("-", "_")
        name = SHORT.get(name, name)
        if name.startswith("no_") and _is_switch(hints.get(name[3:])):
            name, equals, value = name[3:], "=", "false"
        _check_known(name, hints, flags)
        if not equals and _is_switch(hints.get(name)):
            value = rest.pop(0) if rest and rest[0].lower() in ("true", "false") else "true"
        elif not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{name} needs a value")
            value = rest.pop(0)
        yield f"--{name}={_value(name, value, hints)}"


def _value(name: str, value: str, hints: dict[str, Any]) -> str:
    if name == "config":
        return str(_config_file(value))
    lists = typing.get_origin(hints.get(name)) is list
    if not value.startswith("[") and (lists or (name == "sites" and "," in value)):
        return f"[{value}]"
    return value


def _check_known(name: str, hints: dict[str, Any], flags: set[str]) -> None:
    parent = name.partition(".")[0]
    if f"--{name}" in flags or (hints.get(parent) == dict[str, Any] and "." in name):
        return
    names = sorted({flag[2:] for flag in flags if flag.startswith("--")} | {*SHORT}, reverse=True)
    # the last part counts too: --learning-rate is far from every flag, but --weight-decay ends one
    ends = [flag for flag in names if flag.endswith(f".{name}")]
    near = ends or difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = (
        f"did you mean {' or '.join('--' + n.replace('_', '-') for n in near)}?"
        if near
        else "see --help"
    )
    raise ConfigError(f"unknown option --{name.replace('_', '-')}: {hint}")


def _config_file(name: str) -> Path:
    """A path, or the shipped config of that name."""
    if (SHIPPED / f"{name}.yaml").is_file() and not Path(name).exists():
        return SHIPPED / f"{name}.yaml"
    if not Path(name).is_file():
        if (SHIPPED.with_name("studies") / f"{name}.yaml").is_file():
            raise ConfigError(
                f"{name} is a study, not a config file: run it with feedbackward study {name}"
            )
        raise ConfigError(
            f"there is no config file {name}: give a path, or one of the shipped: {_shipped()}"
        )
    return Path(name)


def _shipped() -> str:
    return ", ".join(sorted(file.stem for file in SHIPPED.glob("*.yaml")))


def _hints(kind: type, prefix: str = "") -> dict[str, Any]:
    """Type of every field by its dotted name, nested dataclasses included."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(kind).items():
        found[prefix + name] = hint
        if dataclasses.is_dataclass(hint):
            found |= _hints(typing.cast(type, hint), f"{prefix}{name}.")
    return found


def _is_switch(hint: Any) -> bool:
    return hint is bool or (isinstance(hint, types.UnionType) and bool in typing.get_args(hint))


def _sentence(error: argparse.ArgumentError) -> str:
    """jsonargparse's message on one line, with the flag instead of the "parser key"."""
    text = " ".join(str(error).split())
    text = (
        text.replace('Parser key "', "--").replace('":', ":", 1)
        if text.startswith("Parser key")
        else text
    )
    return text.replace("typing.", "").replace("<class '", "").replace("'>", "")
