"""Command-line arguments and config files to a config dataclass, through jsonargparse.

Every field is a flag with dashes (``--forward.weight-decay``). What is done here comes before
jsonargparse: underscores for dashes, lists without brackets, switches with a value as in 0.1.0, and
errors that suggest names.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import functools
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import ActionYesNo, ArgumentParser, DefaultHelpFormatter, set_loader

from feedbackward.errors import ConfigError
from feedbackward.experiment.config.files import (
    check_keys,
    from_dict,
    merged,
    nested,
    parse_yaml,
    read_yaml,
)
from feedbackward.experiment.config.numbers import takes_numbers, with_numbers
from feedbackward.experiment.config.options import (
    ABOUT,
    EXAMPLES,
    HEADINGS,
    SHIPPED,
    SHORT,
    Option,
    options,
    shipped,
)

C = TypeVar("C")
MODE = "feedbackward"  # values of flags are read as those of files are
set_loader(MODE, parse_yaml, exceptions=(ConfigError,))
SWITCH = {"true": True, "false": False, "yes": True, "no": False}  # values of a switch, as in 0.1.0
# by config: the other command, and a key that only its config files have
OTHER_COMMAND = {"TrainConfig": ("compare", "rules"), "CompareCommand": ("train", "rule")}


def parse(kind: type[C], arguments: Sequence[str], command: str) -> C:
    """The config that the arguments describe: config files first, then the flags, whatever their order.

    Raises:
        ConfigError: an unknown or repeated flag or key, a missing file, or a value of another type.
    """
    files, flags = read(kind, arguments, command)
    values: dict[str, Any] = {}
    for file, given in files:
        other, mark = OTHER_COMMAND.get(kind.__name__, ("", "-"))
        if mark in given:
            raise ConfigError(
                f"{file} is for another command: feedbackward {other} --config {file}"
            )
        where = f"the config file {file}"
        given = _checked(kind, given, where)
        from_dict(kind, given, where)
        values = merged(values, given)
    return from_dict(kind, merged(values, flags), "the command line")


def read(
    kind: type, arguments: Sequence[str], command: str
) -> tuple[list[tuple[Path, dict[str, Any]]], dict[str, Any]]:
    """The config files that the arguments name, with what they hold, and the values of the flags."""
    parser = _parser(kind, command)
    files, flags = [], []
    for token in _normalised(arguments, kind):
        if token.startswith("--config="):
            file = _config_file(token.partition("=")[2])
            files.append((file, read_yaml(file)))
        else:
            flags.append(token)
    try:
        given = parser.parse_args(flags, defaults=False).as_dict()
    except argparse.ArgumentError as error:
        raise ConfigError(_sentence(error, kind)) from error
    except OverflowError as error:
        raise ConfigError(TOO_LARGE) from error
    return files, given


def validated(kind: type[C], values: Mapping[str, Any], where: str) -> C:
    """The config that nested mappings describe.

    Raises:
        ConfigError: an unknown key, or a value of another type.
    """
    return from_dict(kind, _checked(kind, values, where), where)


TOO_LARGE = "an integer of more than 308 digits stands where a floating-point number belongs"


def _checked(kind: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    check_keys(kind, values, where)
    for option in options(kind):
        if option.is_switch and not _is_switched(value := _at(values, option.field)):
            raise ConfigError(f"{where}: {option.flag}: expected {option.expected}, not {value}")
    if "sites" in values:
        values = {**values, "sites": _names(values["sites"])}
    try:
        values = with_numbers(kind, values, "")
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    try:
        given = _parser(kind, "").parse_object(copy.deepcopy(dict(values)), defaults=False)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{where}: {_sentence(error, kind)}") from error
    except OverflowError as error:
        raise ConfigError(f"{where}: {TOO_LARGE}") from error
    return dict(given.as_dict())


def _at(values: Any, field: str) -> Any:
    for part in field.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def _is_switched(value: Any) -> bool:
    return value is None or isinstance(value, bool) or str(value).lower() in SWITCH


class _Help(DefaultHelpFormatter):
    """Help in the words of the docstrings, with examples as they are written."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)

    def _expand_help(self, action: argparse.Action) -> str:
        return action.help or ""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = [name for name in action.option_strings if not name.endswith("+")]
        if isinstance(action, ActionYesNo) and action.default is False:
            names = names[:1]
        # `_normalised` reads them: jsonargparse would take --data for the mapping `data`
        names += [f"--{SHORT[action.dest]}"] if action.dest in SHORT else []
        value = f" {action.metavar}" if action.metavar else ""
        head = ", ".join(names) + value
        if len(head) <= 78:
            return head
        # choices may be many, and argparse breaks no line here
        lines = textwrap.wrap(head.replace(",", ", "), 78, subsequent_indent=" " * 8)
        return "\n".join(lines).replace(", ", ",")


@functools.cache
def _parser(kind: type, command: str) -> ArgumentParser:
    example = EXAMPLES.get(command)
    models = " [MODEL ...]" if command == "cost" else ""
    parser = ArgumentParser(
        prog=f"feedbackward {command}",
        usage=f"feedbackward {command}{models} [--config FILE] [--flag value ...]",
        description=ABOUT.get(command),
        epilog=f"examples:\n{example}" if example else None,
        formatter_class=_Help,
        exit_on_error=False,
        allow_abbrev=False,
        parser_mode=MODE,
    )
    # read before the others, in `read`; here for --help
    parser.add_argument(
        "--config", metavar="FILE", help=f"a YAML file, or one that is shipped: {shipped()}"
    )
    groups = {heading: parser.add_argument_group(heading) for heading in HEADINGS}
    for option in sorted(options(kind), key=_place):
        _add(groups[option.heading], option)
    return parser


def _place(option: Option) -> int:
    """Where a flag stands below its heading; flags that no heading names stay in order."""
    names = HEADINGS[option.heading].split()
    return names.index(option.field) if option.field in names else len(names)


def _add(group: Any, option: Option) -> None:
    value = option.default
    shown = ",".join(map(str, value)) if isinstance(value, list) else value
    shown = "yes" if value is True else shown
    hidden = value is None or value is False or shown in ("", {})
    said = "" if hidden else f" (default: {shown})"
    more: dict[str, Any] = {"help": option.help + said, "default": option.default}
    if option.is_switch:
        group.add_argument(option.flag, action=ActionYesNo(no_prefix="no-"), **more)
    else:
        group.add_argument(option.flag, type=option.hint, metavar=option.metavar, **more)


def _normalised(arguments: Sequence[str], kind: type) -> Iterator[str]:
    """Every flag as ``--full-name=value``, a switch as ``--name`` or ``--no-name``."""
    known = {flag: option for option in options(kind) for flag in option.flags}
    rest = list(arguments)
    while rest:
        token = rest.pop(0)
        if token in ("-h", "--help"):
            yield token
            continue
        if not token.startswith("-") and "--models" in known:
            yield f"--models+={token}"
            continue
        if not token.startswith("--"):
            raise ConfigError(
                f"unexpected argument '{token}': options start with --, as in --model vgg6"
            )
        name, equals, value = token.partition("=")
        name, option, off = _find(name, known)
        if option is not None and option.is_switch:
            if not equals and rest and rest[0].lower() in SWITCH:
                value = rest.pop(0)
            if value and value.lower() not in SWITCH:
                raise ConfigError(f"{name}: expected no value, or true or false, not {value}")
            on = SWITCH.get(value.lower(), True) != off
            yield option.flag if on else f"--no-{option.flag[2:]}"
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"{name} needs a value")
            value = rest.pop(0)
        yield f"{name}={_bracketed(option, value, kind)}"


def _find(name: str, known: Mapping[str, Option]) -> tuple[str, Option | None, bool]:
    """A flag by its full name, its option, and whether it is a switch's --no- form.

    Raises ConfigError, with the nearest flags, for a flag that does not exist.
    """
    dashed = name.replace("_", "-")
    if dashed in known:
        return known[dashed].flag, known[dashed], False
    positive = "--" + dashed.removeprefix("--no-")
    if dashed.startswith("--no-") and positive in known and known[positive].is_switch:
        return known[positive].flag, known[positive], True
    part, dot, key = name.partition(".")
    part = part.replace("_", "-")
    if dot and part in known and known[part].is_mapping:
        return f"{part}.{key}", None, False
    if dashed == "--config":
        return dashed, None, False
    # the last part counts too: --learning-rate is far from every flag, but --weight-decay ends one
    names = [*sorted(known, reverse=True), "--config"]
    ends = [flag for flag in known if flag.endswith(f".{dashed[2:]}")]
    near = ends or difflib.get_close_matches(dashed, names, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else "see --help"
    if dashed.startswith("--parallel."):
        hint = "only train and compare divide a run over processes"
    raise ConfigError(f"unknown option {dashed}: {hint}")


def _bracketed(option: Option | None, value: str, kind: type) -> str:
    """A list as YAML has it. Raises ConfigError for an unknown key of a mapping in it."""
    if option is None or not (option.is_list or takes_numbers(option.hint)):
        return value
    whole = f"[{value}]" if option.is_list and not value.startswith("[") else value
    if option.field != "sites" or value.startswith("["):
        try:
            items = with_numbers(option.hint, parse_yaml(whole), option.field)
            check_keys(kind, nested(option.field, items), option.flag)
        except ConfigError as error:
            if str(error).startswith(option.flag):
                raise
            raise ConfigError(f"{option.flag} {value}: {error}") from error
        return json.dumps(_names(items) if option.field == "sites" else items, default=str)
    return json.dumps([name.strip() for name in value.split(",")]) if "," in value else value


def _names(sites: Any) -> Any:
    """The modules of an nn.Sequential have numbers for names."""
    if isinstance(sites, list):
        return [str(s) if type(s) is int else s for s in sites]
    return str(sites) if type(sites) is int else sites


def _config_file(name: str) -> Path:
    """A path, or the shipped config of that name."""
    for file in (Path(name), SHIPPED / f"{name}.yaml"):
        if file.is_file():
            return file
    near = difflib.get_close_matches(name, [file.stem for file in SHIPPED.glob("*.yaml")], n=1)
    hint = f"did you mean {near[0]}? Else " if near else ""
    raise ConfigError(f"there is no config file {name}: {hint}give a path, or one of {shipped()}")


def _sentence(error: argparse.ArgumentError, kind: type) -> str:
    """jsonargparse's message on one line: the flag, what it takes and what it was given."""
    text = " ".join(str(error).split())
    key, _, rest = text.removeprefix('Parser key "').partition('":')
    option = next((option for option in options(kind) if option.field == key), None)
    if option is None or not text.startswith("Parser key"):
        return text
    _, _, value = rest.rpartition(" value: ")
    return f"{option.flag}: expected {option.expected}, not {value or rest.strip()}"
