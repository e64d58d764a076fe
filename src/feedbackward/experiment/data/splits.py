"""Data that is split in three, of any task but images."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from feedbackward.experiment.data.digest import digest_of, digests_of
from feedbackward.experiment.data.loader import Batches

# fixed, so that runs with different seeds select on the same data
SPLIT_SEED = 20_240_607


def split_order(count: int) -> np.ndarray:
    """The random order [count] in which data without a split of its own is divided, always the same."""
    # RandomState, because its streams are guaranteed never to change
    return np.random.RandomState(SPLIT_SEED).permutation(count)


@dataclass(frozen=True)
class Pairs:
    """Inputs [N, ...] and their targets [N, ...]: tokens and those that follow them, or places and their colours."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, index: Tensor) -> Pairs:
        """The pairs at `index` (int64 [n]), copied."""
        return Pairs(self.inputs[index], self.targets[index])

    def digest(self) -> str:
        """SHA-256 over shapes and values, in order."""
        return digest_of(self.inputs, self.targets)


class PairLoader(Batches):
    """Batches of pairs."""

    examples: Pairs

    def rows(self, index: Tensor, epoch: int, batch: int) -> tuple[Tensor, Tensor]:
        chosen = self.examples.take(index)
        return chosen.inputs.to(self.device), chosen.targets.to(self.device)


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
