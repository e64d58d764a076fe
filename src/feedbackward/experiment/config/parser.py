"""The plain parser of a command's options. It imports nothing but the standard library, so that a command may refuse at once."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from feedbackward.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Of `feedbackward COMMAND`. Its errors are ConfigErrors, as everywhere else."""

    def __init__(self, command: str, about: str, **more: Any) -> None:
        super().__init__(
            prog=f"feedbackward {command}", description=about, allow_abbrev=False, **more
        )

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")
