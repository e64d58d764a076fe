"""Data that is split in three, of any task but images."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from feedbackward.experiment.data.digest import digests_of


@dataclass(frozen=True)
class SplitData:
    """Data, split.

    Attributes:
        train, validation, test: have a length, `take(index)` and `digest()`.
        classes: names of a network's outputs, in order.
        shape: of one row of the inputs, as a network is told it.
        form: what a model needs to know of its inputs.
    """

    name: str
    train: Any
    validation: Any
    test: Any
    classes: list[str]
    shape: tuple[int, ...]
    form: dict[str, Any]
    note: str = ""

    @property
    def num_classes(self) -> int:
        """The number of outputs."""
        return len(self.classes)

    @functools.cached_property
    def digests(self) -> dict[str, str]:
        """SHA-256 over each split, in order."""
        return digests_of(self)
