"""Tasks: what the training loop asks for, and all that it knows of images or texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from feedbackward.experiment.config.data import DataConfig
from feedbackward.experiment.config.tasks import KINDS, Kind
from feedbackward.experiment.data.dataset import Data, Loader, fingerprint_data, load_data
from feedbackward.experiment.data.loader import Batches
from feedbackward.experiment.data.text import (
    SequenceLoader,
    TextData,
    fingerprint_text,
    load_text,
)

AnyData = Data | TextData


@dataclass(frozen=True)
class Task:
    """Data, batches, loss and measures of a task whose outputs are scores of classes.

    Outputs are [N, ..., C] and targets [N, ...]; N rows hold `count` predictions.

    Attributes:
        load, fingerprint: the data of a config, and a digest of the files that they come from.
        batches: makes the loader of a split.
        rows: rows of a batch of an evaluation, at least.
    """

    name: str
    load: Callable[[DataConfig], AnyData]
    fingerprint: Callable[[DataConfig], str]
    batches: Callable[..., Batches]
    rows: int

    @property
    def kind(self) -> Kind:
        """How it counts, and the measure that decides."""
        return KINDS[self.name]

    def loss(self, output: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
        """Cross-entropy over all predictions."""
        return F.cross_entropy(output.float().flatten(0, -2), target.flatten(), reduction=reduction)

    def hits(self, output: Tensor, target: Tensor) -> Tensor:
        """How many predictions are right."""
        return (output.argmax(-1) == target).sum()

    def count(self, target: Tensor) -> int:
        """How many predictions a batch asks for."""
        return target.numel()

    def measures(self, loss: float, accuracy: float) -> dict[str, float]:
        """What is recorded of a split: mean loss, percentage of right predictions, and the measure that decides."""
        found = {"loss": loss, "accuracy": accuracy}
        if self.kind.measure.key == "perplexity":
            found["perplexity"] = float(torch.tensor(loss, dtype=torch.float64).exp())
        return found

    def output_shape(self, target: Tensor, data: AnyData) -> tuple[int, ...]:
        """The shape that a network's output must have."""
        return (*target.shape, data.num_classes)


def _text_batches(
    split: Any, data: Any, *options: Any, augment: str = "none", **named: Any
) -> Batches:
    return SequenceLoader(split, *options, **named)


TASKS: dict[str, Task] = {
    "classification": Task("classification", load_data, fingerprint_data, Loader, 250),
    "language_model": Task("language_model", load_text, fingerprint_text, _text_batches, 64),
}
