"""What a run or a comparison is asked to do: settings, files, command-line arguments."""

from typing import Any

_SCHEMA = ("Changes", "CompareConfig", "RuleEntry", "Search", "Settings", "TrainConfig", "slug")


def __getattr__(name: str) -> Any:
    """The classes of settings, at their first use: help on the command line must not wait for them."""
    if name in _SCHEMA:
        from feedbackward.experiment.config import schema

        return getattr(schema, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
