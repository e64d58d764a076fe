"""What the training loop asks of a task: all that it knows of images, texts, graphs, music, pictures or clicks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from feedbackward.experiment.config.data import DataConfig
from feedbackward.experiment.config.tasks import KINDS, Kind
from feedbackward.experiment.data.clicks import area
from feedbackward.experiment.data.dataset import Data
from feedbackward.experiment.data.loader import Batches
from feedbackward.experiment.data.splits import SplitData

AnyData = Data | SplitData


@dataclass(frozen=True)
class Task(ABC):
    """Data, batches, loss and measures. Inputs of a batch are a tensor, or a tuple of the network's arguments.

    Attributes:
        load, fingerprint: the data of a config, and a digest of the files that they come from.
        batches: makes the loader of a split.
        rows: rows of a batch of an evaluation, at least.
        whole: whether a batch cannot be divided into parts whose mean losses count alike.
        labelled: whether targets are classes.
        ranked: whether it measures how a split's outputs are ordered, all of them together.
    """

    name: str
    load: Callable[[DataConfig], AnyData]
    fingerprint: Callable[[DataConfig], str]
    batches: Callable[..., Batches]
    rows: int
    whole: bool = False
    labelled: bool = True
    ranked: bool = False

    @property
    def kind(self) -> Kind:
        """How it counts, and the measure that decides."""
        return KINDS[self.name]

    @abstractmethod
    def loss(self, output: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
        """The loss of all predictions: their mean or their sum."""

    @abstractmethod
    def count(self, target: Tensor) -> int:
        """How many predictions a batch asks for."""

    @abstractmethod
    def hits(self, output: Tensor, target: Tensor) -> Tensor:
        """How many predictions are right; 0 where there is no right and wrong."""

    @abstractmethod
    def measures(self, loss: float, accuracy: float) -> dict[str, float]:
        """What is recorded of a split, from its mean loss and its percentage of right predictions."""

    def ranking(self, output: Tensor, target: Tensor) -> dict[str, float]:
        """What is recorded of the order of all outputs of a split, where the task is `ranked`."""
        return {}

    @abstractmethod
    def output_shape(self, target: Tensor, data: AnyData) -> tuple[int, ...]:
        """The shape that a network's output must have."""

    @abstractmethod
    def guess(self, data: AnyData) -> float:
        """The mean loss of a network that has learned nothing."""

    def told(self, target: Tensor) -> Tensor:
        """The target as rules are told it that send targets."""
        return target


class Classes(Task):
    """Outputs are scores of classes [N, ..., C] and targets their numbers [N, ...]; those below 0 are in no loss."""

    def loss(self, output: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(output.float().flatten(0, -2), target.flatten(), reduction=reduction)

    def count(self, target: Tensor) -> int:
        return int((target >= 0).sum())

    def hits(self, output: Tensor, target: Tensor) -> Tensor:
        return (output.argmax(-1) == target).sum()

    def measures(self, loss: float, accuracy: float) -> dict[str, float]:
        found = {"loss": loss, "accuracy": accuracy}
        if self.kind.measure.key == "perplexity":
            found["perplexity"] = float(torch.tensor(loss, dtype=torch.float64).exp())
        return found

    def output_shape(self, target: Tensor, data: AnyData) -> tuple[int, ...]:
        return (*target.shape, data.num_classes)

    def guess(self, data: AnyData) -> float:
        return math.log(data.num_classes)


class Clicks(Classes):
    """Outputs are scores [N, 2] of no click and of a click, and targets 1 for a click, [N]."""

    def measures(self, loss: float, accuracy: float) -> dict[str, float]:
        return {"loss": loss, "log_loss": loss}

    def ranking(self, output: Tensor, target: Tensor) -> dict[str, float]:
        """The area under the ROC curve."""
        return {"auc": area(output[:, 1] - output[:, 0], target)}

    def guess(self, data: AnyData) -> float:
        """The entropy of the share of clicks."""
        targets: Tensor = data.train.targets  # type: ignore[union-attr]
        share = targets.double().mean()
        return float(torch.special.entr(torch.stack([share, 1 - share])).sum())


class Frames(Task):
    """Outputs are logits of keys [N, T, K]. Targets are 0 and 1, and below 0 in frames that are padding."""

    def loss(self, output: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
        """Binary cross-entropy, summed over keys: the negative log-likelihood of a frame, in nats."""
        there = target[..., 0] >= 0
        total = F.binary_cross_entropy_with_logits(
            output.float()[there], target[there], reduction="sum"
        )
        return total if reduction == "sum" else total / there.sum()

    def count(self, target: Tensor) -> int:
        return int((target[..., 0] >= 0).sum())

    def hits(self, output: Tensor, target: Tensor) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=output.device)

    def measures(self, loss: float, accuracy: float) -> dict[str, float]:
        return {"loss": loss, "nll": loss}

    def output_shape(self, target: Tensor, data: AnyData) -> tuple[int, ...]:
        return tuple(target.shape)

    def guess(self, data: AnyData) -> float:
        return data.num_classes * math.log(2)

    def told(self, target: Tensor) -> Tensor:
        return target.clamp_min(0)


class Values(Task):
    """Outputs and targets are values [N, C] from 0 to 1."""

    def loss(self, output: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
        """The mean square of the errors of a row."""
        total = (output.float() - target).square().mean(-1)
        return total.sum() if reduction == "sum" else total.mean()

    def count(self, target: Tensor) -> int:
        return len(target)

    def hits(self, output: Tensor, target: Tensor) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=output.device)

    def measures(self, loss: float, accuracy: float) -> dict[str, float]:
        """With the peak signal-to-noise ratio, `-10 log10(mean square error)` in dB."""
        return {"loss": loss, "psnr": -10 * math.log10(max(loss, 1e-30))}

    def output_shape(self, target: Tensor, data: AnyData) -> tuple[int, ...]:
        return tuple(target.shape)

    def guess(self, data: AnyData) -> float:
        targets: Tensor = data.train.targets  # type: ignore[union-attr]
        return float(targets.var(0, correction=0).mean())
