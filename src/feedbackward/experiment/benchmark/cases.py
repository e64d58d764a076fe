"""The training steps that `feedbackward cost --measure` takes: one for every rule, operator and schedule."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feedbackward.attaching import attach
from feedbackward.errors import AttachError
from feedbackward.experiment.benchmark.steps import Case, TrainingStep
from feedbackward.experiment.benchmark.subject import Subject, choices
from feedbackward.experiment.config.cost import CostConfig
from feedbackward.experiment.training.checkpointed import add_checkpoints, groupings
from feedbackward.learner import Learner
from feedbackward.rules import Rule
from feedbackward.schedules.delayed import Delayed
from feedbackward.schedules.dsp import DSP

# small: on random images a larger one may diverge, and a step's cost does not depend on it
LEARNING_RATE = 1e-3


def make_cases(config: CostConfig, model: str, device: torch.device) -> list[Case]:
    """Backprop, backprop with checkpoints, and all that the configuration asks for."""
    factory = Factory(config, model, device)
    cases = [
        Case("bp", "joint", "-", factory.backprop),
        Case("bp, checkpointed", "joint", "-", factory.checkpointed),
    ]
    for choice in choices(config):
        for schedule in config.schedules:
            build = factory.learner(choice.make, schedule)
            cases.append(Case(choice.rule, schedule, choice.operator, build))
    return cases


class Factory:
    """Makes the networks of one bench: all from the same seed, on the same batch."""

    def __init__(self, config: CostConfig, model: str, device: torch.device) -> None:
        self.config, self.device = config, device
        self.subject = Subject(config, model, device)
        self.net = self.subject.net
        self.x, self.y = self.subject.batch()
        self._group: int | None = None

    def backprop(self) -> TrainingStep:
        """The plain network."""
        return self.training_step(self.net())

    def checkpointed(self) -> TrainingStep:
        """Backprop that keeps the inputs of some parts of the network and computes the rest again.

        A fair opponent of replay: of parts of 1, 2, 4, ... blocks those are taken that need the least memory.
        """
        if self._group is None:
            self._group = self._best_group()
        model = self.net()
        parts = add_checkpoints(model, self._group)
        blocks = "1 block" if self._group == 1 else f"up to {self._group} blocks"
        return replace(
            self.training_step(model),
            note=f"{parts} parts of {blocks}, the least memory of those tried",
        )

    def _best_group(self) -> int:
        sizes = {}
        for group in groupings(self.net()):
            model = self.net()
            add_checkpoints(model, group)
            made = self.training_step(model, compiled=False)
            made.step()
            sizes[group] = made.activation_bytes(self.device) or 0
        return min(sizes, key=lambda group: sizes[group])

    def learner(self, make: Callable[[], Rule], schedule: str) -> Callable[[], TrainingStep]:
        """How to make the network that a rule trains by a schedule."""

        def build() -> TrainingStep:
            if self.config.compile and schedule != "joint":
                raise AttachError(
                    f'schedule="{schedule}" runs one segment after the other, and torch.compile would '
                    "break it up: leave out --compile."
                )
            rule, subject = make(), self.subject
            few = self.x[: max(2, rule.least_batch)]
            learner = attach(
                self.net(), rule, example=few, sites=subject.sites, error_at=self.config.error_at
            )
            return self.training_step(learner.train(), schedule)

        return build

    def training_step(
        self, net: nn.Module, schedule: str = "joint", compiled: bool = True
    ) -> TrainingStep:
        """A step of this network, or learner, and of its optimizer."""
        compiled = compiled and self.config.compile
        way, _, keep = schedule.partition("-")
        optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE, momentum=0.9)
        forward: Any = torch.compile(net) if compiled else net
        learner = net if isinstance(net, Learner) else None
        stale = Delayed(learner) if learner is not None and isinstance(learner.rule, DSP) else None

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            if learner is not None and learner.attached.needs_target:
                learner.target(self.y)
            if learner is None or schedule == "joint":
                with self.precision():
                    loss = self.loss(forward(self.x))
                loss.backward()
            else:
                with self.precision():
                    learner.backward(self.x, self.loss, way, keep_inputs=bool(keep))  # type: ignore[arg-type]
            if learner is not None and learner.attached.in_phase:
                with self.precision():
                    learner.feedback_step(self.x, self.loss)
            if stale is not None:
                stale.exchange()
            optimizer.step()

        for _ in range(
            max(stale.delays) if stale is not None else 0
        ):  # until all gradients have arrived, and the optimizer's state is there
            step()
        feedback = learner.feedback_bytes if learner is not None else 0
        return TrainingStep(step, net, optimizer, (self.x, self.y), feedback, seen=not compiled)

    def loss(self, output: Tensor) -> Tensor:
        """Mean cross entropy of the batch."""
        return F.cross_entropy(output.float(), self.y)

    @contextlib.contextmanager
    def precision(self) -> Iterator[None]:
        """Autocast, where the configuration asks for it."""
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"
        ):
            yield
