"""Counting what a training step costs. No image is read and no time is taken."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from feedbackward.attaching import attach
from feedbackward.errors import ConfigError, FeedbackError
from feedbackward.experiment.benchmark.subject import Subject, choices
from feedbackward.experiment.config.cost import CostConfig
from feedbackward.measure.cost import Cost, count_cost
from feedbackward.rules import BP, Rule


@dataclass(frozen=True)
class Row:
    """What a rule with an operator costs, or why it is refused."""

    rule: str
    operator: str  # "-" if the rule has no choice
    cost: Cost | None
    refused: str | None = None

    @property
    def name(self) -> str:
        return self.rule if self.operator == "-" else f"{self.rule}, {self.operator}"


def count_rows(
    config: CostConfig, model: str, status: Callable[[str], Any] = lambda name: None
) -> list[Row]:
    """Backprop's row, then one per rule and operator. `status` is given each row's name beforehand.

    Raises FeedbackError if backprop itself cannot be counted on the model.
    """
    counter, first = _start(config, model)
    rows = [first]
    for choice in choices(config):
        status(choice.rule)
        try:
            rows.append(Row(choice.rule, choice.operator, counter.cost(choice.make())))
        # torch's layers raise ValueError for a batch of one
        except (FeedbackError, ValueError) as error:
            rows.append(Row(choice.rule, choice.operator, None, str(error)))
    return rows


class _Counter:
    """Counts rules on one net."""

    def __init__(self, config: CostConfig, model: str, device: str) -> None:
        self.subject = Subject(config, model, torch.device(device))
        self.model = self.subject.net()
        self.example = torch.zeros(config.batch, *self.subject.shape, device=device)

    def cost(self, rule: Rule) -> Cost:
        with warnings.catch_warnings():
            # of the net: every rule finds the same
            warnings.filterwarnings("once", category=UserWarning)
            # the table says it
            warnings.filterwarnings("ignore", message="the feedback weights take")
            learner = attach(
                self.model,
                rule,
                example=self.example,
                sites=self.subject.sites,
                error_at=self.subject.config.error_at,
            )
            try:
                return count_cost(learner, self.example)
            finally:
                learner.detach()


def _start(config: CostConfig, model: str) -> tuple[_Counter, Row]:
    """A counter that works, and backprop's row: without values, or on the CPU if the model needs them."""
    try:
        counter = _Counter(config, model, "meta")
        return counter, Row("bp", "-", counter.cost(BP()))
    except ConfigError:
        raise
    except Exception:  # whatever a user's own model does without values
        counter = _Counter(config, model, "cpu")
        return counter, Row("bp", "-", counter.cost(BP()))
