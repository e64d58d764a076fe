"""Commands of 0.1.0 under their new names. They work for one release."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence

from feedbackward.experiment.config.suggest import hint

# a flag of `study`, and what it is in `compare`
STUDY = {
    "--models": "--only.models",
    "--data-names": "--only.data",
    "--rules": "--only.rules",
    "--sections": "--only.sections",
    "--seeds": "--only.seeds",
    "--list": "--dry-run",
    "--report": "--report-only",
}


def renamed(command: str, arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The command and its arguments as they are written today; says so on stderr."""
    if command == "bench":
        new, rest = "cost", [*arguments, "--measure"]
    elif command == "study":
        new, rest = "compare", list(_study(arguments))
    else:
        return command, list(arguments)
    spelled = shlex.join(["feedbackward", new, *rest])
    print(f"feedbackward: '{command}' is now '{new}': {spelled}", file=sys.stderr)
    return new, rest


def _study(arguments: Sequence[str]) -> Iterator[str]:
    rest, folder, name, scale = list(arguments), False, "", ""
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        if flag == "--set":
            key, _, value = (value or (rest.pop(0) if rest else "")).partition("=")
            yield f"--{key.replace('_', '-')}={value}"
        elif flag.startswith("-"):
            folder = folder or flag == "--out"
            if flag == "--scale":
                scale = value or (rest[0] if rest else "")
            yield STUDY.get(flag, flag) + equals + value
        elif name or not flag:
            yield flag
        else:
            name = flag
            yield f"--config={name}"
    if name and not folder:
        # where 0.1.0 put the results
        stem = name.rpartition("/")[2].removesuffix(".yaml")
        yield f"--out=runs/study-{stem}" + (f"-{float(scale):g}" if scale else "")


def unknown(command: str, known: Sequence[str]) -> str:
    """What to say of a command that does not exist."""
    return f"unknown command '{command}': {hint(command, known)}"
