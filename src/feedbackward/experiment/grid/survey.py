"""What the data sets of a grid hold, and which of them are missing."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from feedbackward.errors import DataError
from feedbackward.experiment.config.schema import CompareConfig
from feedbackward.experiment.data.dataset import DataConfig
from feedbackward.experiment.data.sources import DATASETS
from feedbackward.experiment.grid.plan import Comparison, Plan
from feedbackward.experiment.training.building import forget_data, shared_data
from feedbackward.experiment.training.interrupts import Interrupts


@dataclass(frozen=True)
class Facts:
    """Of the data of one comparison; `train` is what it trains on, `whole` what it could, `official` what was published."""

    train: int
    whole: int
    official: int | None
    validation: int
    test: int
    classes: int
    shape: tuple[int, ...]
    note: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def survey(plan: Plan, interrupts: Interrupts) -> tuple[Plan, dict[str, Facts], dict[str, str]]:
    """Look at every data set, once.

    Returns the plan with the number of training images that its scale asks for, and by the comparisons' folders the facts,
    or the reason why there is no data. A set that was never read is decoded here, before several processes want it.
    """
    facts: dict[str, Facts] = {}
    missing: dict[str, str] = {}
    seen: dict[tuple[str, DataConfig], Facts | str] = {}
    sized: dict[str, Comparison] = {}
    for folder, comparison in plan.comparisons.items():
        interrupts.check()
        task = comparison.config.task
        whole = task, replace(comparison.config.data, train_limit=None)
        if whole not in seen:
            with interrupts.at_once():
                seen[whole] = _look(*whole)
        found, config = seen[whole], comparison.config
        if isinstance(found, str):
            missing[folder] = found
        else:
            config = _limited(config, found.whole, plan.options.scale)
            facts[folder] = replace(found, train=config.data.train_limit or found.whole)
        sized[folder] = replace(comparison, config=config)
    forget_data()  # the last one is not needed in this process while workers run
    return replace(plan, comparisons=sized), facts, missing


def _look(task: str, config: DataConfig) -> Facts | str:
    try:
        data = shared_data(config, task)
    except DataError as error:
        return " ".join(str(error).split())
    official = DATASETS[config.name].official if config.name in DATASETS else None
    count = len(data.train)
    return Facts(
        train=count,
        whole=count,
        official=official[0] if official else None,
        validation=len(data.validation),
        test=len(data.test),
        classes=data.num_classes,
        shape=data.shape,
        note=data.note,
    )


def _limited(config: CompareConfig, whole: int, scale: float) -> CompareConfig:
    """With the limit of training images: the first so many of the fixed random order that the data module draws."""
    available = min(config.data.train_limit or whole, whole)
    if scale == 1 and config.data.train_limit is None:
        return config
    return replace(config, data=replace(config.data, train_limit=max(2, round(scale * available))))
