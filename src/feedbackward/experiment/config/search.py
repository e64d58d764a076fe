"""The search of rates before a comparison."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from feedbackward.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Search:
    """The search of rates before a comparison: equal trials per rule, held-out data decide.

    Attributes:
        run: pick the rates of every rule on held-out images first; --search is short for it.
        by: how the rates to try are found. grid: those that are given; optuna: Optuna suggests them, between the smallest
            and the largest that are given (extra `search`).
        lr: rates of W to try.
        feedback_lr: rates of B to try with each. A rule that learns no B tries as many more rates of W.
        epochs: epochs of a trial.
        seed: seed of the trials, and of what Optuna suggests.
        baseline_only: search for backprop alone (or for the first rule, if backprop is not compared); the
            other rules take its rate of W. A B without a rate of its own (KP, Relayed KP) follows W.
        trials: with optuna, trials of every rule; by default as many as the grid has.
        prune: with optuna, the pruner that ends a bad trial after one of its epochs: median, or halving (Optuna's
            successive halving).
        at_once: with optuna, how many trials of a rule are suggested together. More can run at once, and each knows less.
    """

    run: bool = False
    by: Literal["grid", "optuna"] = "grid"
    lr: list[float] = field(default_factory=lambda: [0.005, 0.02, 0.08])
    feedback_lr: list[float] = field(default_factory=lambda: [0.002, 0.02])
    epochs: int = 3
    seed: int = 1000
    baseline_only: bool = False
    trials: int | None = None
    prune: Literal["median", "halving", "none"] = "median"
    at_once: int = 1

    def check(self) -> None:
        """Raise ConfigError for a search that cannot be made."""
        if not self.run:
            return
        if not (self.lr and self.feedback_lr and self.epochs > 0):
            raise ConfigError("search needs at least one lr, one feedback_lr and one epoch")
        if self.by == "grid":
            if self.trials is not None:
                raise ConfigError(
                    f"search.trials is {self.trials}, and a grid has as many as its lr and feedback_lr make: leave it "
                    "out, or give --search.by optuna"
                )
            return
        for name in ("trials", "at_once"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"search.{name} is {value}: it must be at least 1")
        for name in ("lr", "feedback_lr"):
            if not min(getattr(self, name)) > 0:
                raise ConfigError(
                    f"search.{name} is {getattr(self, name)}: rates that Optuna suggests lie evenly on a logarithmic scale, "
                    "so its ends must be above 0"
                )
