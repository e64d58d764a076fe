"""What a run, a comparison or a study is asked to do: settings, files, command-line arguments."""

from feedbackward.experiment.config.schema import (
    Changes,
    CompareConfig,
    RuleEntry,
    Search,
    Settings,
    TrainConfig,
    slug,
)

__all__ = [
    "Changes",
    "CompareConfig",
    "RuleEntry",
    "Search",
    "Settings",
    "TrainConfig",
    "slug",
]
