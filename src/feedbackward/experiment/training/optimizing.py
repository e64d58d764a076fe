"""One set of weights with its optimizer, schedule and clipping, as a recipe says."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, lr_scheduler

from feedbackward.errors import ConfigError
from feedbackward.experiment.config.recipes import Optimizer
from feedbackward.experiment.imported import imported
from feedbackward.optim import Muon, renormalize_weights


class Weights:
    """Parameters that one optimizer updates; one call of `step` per batch."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        settings: Optimizer,
        epochs: int,
        steps_per_epoch: int,
    ) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.settings = settings
        self.optimizer = _optimizer(self.parameters, settings)
        if settings.renormalize_weights:
            renormalize_weights(self.parameters, self.optimizer)
        self.schedule = _schedule(self.optimizer, settings, epochs, steps_per_epoch)

    @property
    def lr(self) -> float:
        """The current learning rate."""
        return float(self.optimizer.param_groups[0]["lr"])

    def step(self, scaler: torch.amp.GradScaler) -> None:
        """Clip, update, advance the schedule, and drop the gradients. Without any gradient only the schedule advances."""
        if any(p.grad is not None for p in self.parameters):
            if self.settings.clip:
                scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
            scaler.step(self.optimizer)
        if self.schedule.last_epoch == 0:
            self._first_schedule_step()
        else:
            self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _first_schedule_step(self) -> None:
        with warnings.catch_warnings():  # under fp16 the scaler may rightly skip the first update
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.schedule.step()

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's and the schedule's state."""
        return {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])


# what an optimizer is given of the settings, if it takes it
_OFFERED = ("lr", "momentum", "nesterov", "weight_decay")


def find_optimizer(name: str) -> Any:
    """The class of this name, or `package.module:Class`. Raises ConfigError for what is no optimizer."""
    named = {"sgd": SGD, "adam": Adam, "adamw": AdamW, "muon": Muon}
    if name in named:
        return named[name]
    found = imported(name, "optimizer")
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise ConfigError(f"'{name}' is not a subclass of torch.optim.Optimizer")
    return found


def _optimizer(parameters: list[nn.Parameter], settings: Optimizer) -> torch.optim.Optimizer:
    kind = find_optimizer(settings.name)
    takes = inspect.signature(kind).parameters
    given = {key: getattr(settings, key) for key in _OFFERED if key in takes}
    try:
        return kind(parameters, **given)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the optimizer '{settings.name}' cannot be made with {given}: {error}"
        ) from error


def _schedule(
    optimizer: torch.optim.Optimizer, settings: Optimizer, epochs: int, steps_per_epoch: int
) -> lr_scheduler.LRScheduler:
    """Advanced once per step; the momentum stays as it is."""
    steps = epochs * steps_per_epoch
    if settings.schedule == "one-cycle":
        return lr_scheduler.OneCycleLR(
            optimizer, settings.lr, total_steps=steps, cycle_momentum=False
        )
    if settings.schedule == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    if settings.schedule == "step":
        return lr_scheduler.StepLR(optimizer, step_size=steps_per_epoch, gamma=settings.gamma)
    return lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0)
