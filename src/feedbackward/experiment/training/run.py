"""One run in memory: network, rule, optimizers and data, one step at a time, and its state."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from feedbackward.errors import AttachError, CheckpointError, ConfigError, DivergenceError
from feedbackward.experiment.config.schema import TrainConfig
from feedbackward.experiment.randomness import (
    random_state,
    restore_random_state,
    seed_everything,
)
from feedbackward.experiment.tasks import TASKS, AnyData
from feedbackward.experiment.training.building import build_learner
from feedbackward.experiment.training.checkpoint import check_same_tensors
from feedbackward.experiment.training.diagnose import first_non_finite
from feedbackward.experiment.training.identity import (
    check_same_data,
    check_same_network,
    check_same_settings,
    data_identity,
    described,
    tied_settings,
)
from feedbackward.experiment.training.optimizing import Weights
from feedbackward.measure.probe import Probe, probe
from feedbackward.model.example import run as run_model
from feedbackward.schedules.delayed import Delayed
from feedbackward.schedules.dsp import own_delays

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Position:
    """How far a run is (finished epochs, steps of the next, rows, last epoch probed), and sums of its epoch."""

    epoch: int = 0
    batch: int = 0
    rows: int = 0
    probed: int = -1
    loss_sum: float = 0.0
    correct: int = 0
    seen: int = 0
    epoch_seconds: float = 0.0
    seconds: float = 0.0

    @classmethod
    def of(cls, found: Any) -> Position:
        """From a checkpoint's values. Raises ValueError where one is missing, unknown or of another type."""
        kinds = {field.name: type(field.default) for field in fields(cls)}
        if {name: type(value) for name, value in dict(found).items()} != kinds:
            raise ValueError(f"its position is {found}")
        return cls(**found)

    def next_epoch(self) -> None:
        """To the start of the next epoch."""
        self.epoch += 1
        self.batch = self.seen = self.correct = 0
        self.loss_sum = self.epoch_seconds = 0.0


class Run:
    """A network that a rule trains on a data set."""

    def __init__(self, config: TrainConfig, data: AnyData, device: torch.device) -> None:
        self.config, self.data, self.device = config, data, device
        recipe = config.training()
        self.epochs = recipe.epochs
        self.task = TASKS[config.task]
        self.learner = build_learner(config, data, device)
        if self.learner.graph.local and not self.task.labelled:
            raise AttachError(
                f"{self.learner.rule.label} learns from classes by local losses, and the targets of the task {config.task} are none: "
                "use a rule with feedback (dfa, dkp)."
            )
        # before anything wraps it: to shard or to compile changes no result
        self.network = described(self.learner.model)
        self.stale = self._staleness()
        self.loader = self.task.batches(
            data.train,
            data,
            recipe.batch_size,
            device=device,
            augment=config.data.augment,
            seed=config.seed,
        )
        assert recipe.feedback is not None
        settings = {"model": recipe.forward, "feedback": recipe.feedback}
        self.weights = {
            part: Weights(
                getattr(self.learner, part).parameters(), chosen, self.epochs, len(self.loader)
            )
            for part, chosen in settings.items()
            if any(p.requires_grad for p in getattr(self.learner, part).parameters())
        }
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.forward: nn.Module = self.learner
        if config.compile:
            self.forward = torch.compile(self.learner)  # type: ignore[assignment]
        self.position = Position()
        seed_everything(config.seed)

    def prepared(self, inputs: Any) -> Any:
        """Images in the memory format of this run; other inputs as they are."""
        if not self.config.channels_last:
            return inputs

        def laid(t: Tensor) -> Tensor:
            return t.to(memory_format=torch.channels_last) if t.dim() == 4 else t

        return tree_map(laid, inputs)

    @contextlib.contextmanager
    def precision(self) -> Iterator[None]:
        """Autocast, where the config asks for it."""
        dtype = _DTYPES.get(self.config.precision)
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            yield

    def step(self, images: Any, labels: Tensor) -> float:
        """One update; returns the mean loss of the batch.

        Raises:
            DivergenceError: the loss is NaN or infinite; no weight has then been changed.
        """
        if frozen := self.feedback_is_frozen:
            self.learner.feedback.requires_grad_(False)
        with self._where_they_arrive():
            value, hits = self._gradients(self.prepared(images), labels)
        if self.stale is not None:
            self.stale.exchange()
        if frozen:
            self.learner.feedback.zero_grad()  # of before, where gradients come late
        for weights in self.weights.values():
            weights.step(self.scaler)
        self.scaler.update()
        position = self.position
        count = self.task.count(labels)
        position.loss_sum += value * count
        position.correct += hits
        position.seen += count
        position.batch += 1
        return value

    def _where_they_arrive(self) -> contextlib.AbstractContextManager[None]:
        """For the passes of a step: late gradients are taken at predicted weights, if the config says so."""
        if self.stale is None or not self.config.predict_weights:
            return contextlib.nullcontext()
        return self.stale.predicted()

    def _gradients(self, images: Any, labels: Tensor) -> tuple[float, int]:
        """The gradients of a batch; returns its mean loss and how many outputs were right."""
        if self.calibrates:
            with self.learner.exact():
                output, loss = self._joint(images, labels)
        else:
            self.tell_target(labels)
            output, loss = self._backward(images, labels)
        rule = self.learner.rule
        if self.learner.attached.in_phase and not (
            self.calibrates
            if rule.revises
            else self.feedback_is_frozen or not self._every(self.config.feedback_every)
        ):
            with self.precision():
                self.learner.feedback_step(images, lambda out: self.task.loss(out, labels))
        correct = self.task.hits(output, labels)
        # one wait for the device, not two
        value, hits = torch.stack([loss.detach().double(), correct]).tolist()
        if not math.isfinite(value):
            self._diverged(value, images)
        return value, int(hits)

    @property
    def calibrates(self) -> bool:
        """Whether the next step is one by exact backprop."""
        return self.config.calibrate_every > 0 and self._every(self.config.calibrate_every)

    def _every(self, steps: int) -> bool:
        """Whether the next step is one of those that come every so many steps."""
        return (self.position.epoch * len(self.loader) + self.position.batch + 1) % steps == 0

    @property
    def calibrations(self) -> int:
        """Steps by exact backprop so far."""
        every, position = self.config.calibrate_every, self.position
        return (position.epoch * len(self.loader) + position.batch) // every if every else 0

    @property
    def feedback_is_frozen(self) -> bool:
        """Whether learned feedback has come to its last epoch."""
        after = self.config.freeze_feedback_after
        return after is not None and self.position.epoch >= after

    def tell_target(self, labels: Tensor) -> None:
        """Give the labels of the next pass to a rule that needs them."""
        if self.learner.attached.needs_target:
            self.learner.target(self.task.told(labels))

    def _joint(self, images: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Output and loss of a batch, its backward done at once."""
        with self.precision():
            output = run_model(self.forward, images)
            loss = self.task.loss(output, labels)
        self.scaler.scale(loss).backward()
        return output, loss

    def _backward(self, images: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Output and loss of a batch, its backward done by the configured schedule."""
        if self.config.schedule == "joint":
            return self._joint(images, labels)
        seen: list[Tensor] = []

        def loss_fn(output: Tensor) -> Tensor:
            seen.append(output.detach())
            return self.scaler.scale(self.task.loss(output, labels))

        with self.precision():
            loss = self.learner.backward(images, loss_fn, schedule=self.config.schedule)
        return seen[-1], loss / self.scaler.get_scale()

    def evaluate(self, split: Any, check: Callable[[], None] | None = None) -> dict[str, float]:
        """The task's measures of a split; ``check()`` is called between batches and may raise."""
        rows = max(self.task.rows, self.loader.batch_size)
        loader = self.task.batches(split, self.data, rows, device=self.device, shuffle=False)
        loss, correct, count = 0.0, 0, 0
        seen: list[tuple[Tensor, Tensor]] = []
        self.learner.eval()
        try:
            with torch.no_grad(), self.precision():
                for inputs, labels in loader.epoch(0):
                    output = self.output(self.prepared(inputs))
                    loss += self.task.loss(output, labels, "sum").item()
                    correct += int(self.task.hits(output, labels))
                    count += self.task.count(labels)
                    if self.task.ranked:
                        seen.append((output.float().cpu(), labels.cpu()))
                    if check:
                        check()
        finally:
            self.learner.train()
        ranking = self.task.ranking(*map(torch.cat, zip(*seen, strict=True))) if seen else {}
        return self.task.measures(loss / count, 100 * correct / count) | ranking

    def output(self, images: Any) -> Tensor:
        """The network's output on a batch."""
        return run_model(self.learner, images)

    def model_state(self) -> dict[str, Tensor]:
        """The network's `state_dict`."""
        return self.learner.model.state_dict()

    def probe(self) -> Probe:
        """The alignment with backprop on the first held-out images, always the same ones."""
        count = min(self.config.probe_images, len(self.data.validation))
        chosen = self.data.validation.take(torch.arange(count))
        batches = self.task.batches(chosen, self.data, count, device=self.device, shuffle=False)
        images, labels = next(batches.epoch(0))
        self.tell_target(labels)
        return probe(
            self.learner,
            lambda out: self.task.loss(out, labels),
            self.prepared(images),
            jacobian=self.config.probe_jacobian,
        )

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs to go on as if it had not stopped."""
        return {
            "config": tied_settings(self.config),
            "data": data_identity(self.data),
            "network": self.network,
            "position": asdict(self.position),
            "model": self.learner.model.state_dict(),
            "feedback": self.learner.feedback.state_dict(),
            "weights": {part: weights.state_dict() for part, weights in self.weights.items()},
            "scaler": self.scaler.state_dict(),
            "stale": None if self.stale is None else self.stale.state_dict(),
            "random": random_state(),
        }

    def load_weights(self, state: dict[str, Any], where: str | os.PathLike[str]) -> None:
        """Restore model and feedback. Raises CheckpointError if they belong to another model."""
        for part in ("model", "feedback"):
            module = getattr(self.learner, part)
            check_same_tensors(state[part], module.state_dict(), f"the {part} in {where}")
            module.load_state_dict(state[part])

    def load(self, state: dict[str, Any], where: str | os.PathLike[str]) -> None:
        """Restore what `state` gave. Raises CheckpointError where it is of other data, or no state of such a run."""
        try:
            check_same_data(state["data"], self.data, where)
            # checkpoints of before do not have them
            if "config" in state:
                check_same_settings(state["config"], self.config, where)
                check_same_network(state["network"], self.network, where)
            self.load_weights(state, where)
            for part, weights in self.weights.items():
                weights.load_state_dict(state["weights"][part])
            self.scaler.load_state_dict(state["scaler"])
            if self.stale is not None:
                self.stale.load_state_dict(state["stale"])
            self.position = Position.of(state["position"])
            restore_random_state(state["random"])
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            cause = " ".join([type(error).__name__, *str(error).split()])
            raise CheckpointError(
                f"{where} does not hold the state of this run ({cause}): use an older copy of it, or start another run"
            ) from error

    def _staleness(self) -> Delayed | None:
        """What delays the gradients, if anything does."""
        own = own_delays(self.learner.rule, len(self.learner.plan.stages))
        delays = [delay + self.config.staleness for delay in own]
        steps = self.config.backward_steps
        if not any(delays) and not steps:
            return None
        if self.config.precision == "fp16":
            raise ConfigError(
                "precision is fp16, whose loss scale may change while a gradient waits: use bf16 or fp32 with staleness"
            )
        return Delayed(self.learner, delays, steps=steps)

    def _diverged(self, value: float, images: Any) -> None:
        with self.precision():
            where = first_non_finite(self.learner, images)
        rates = f"--forward.lr (now {self.weights['model'].settings.lr:g})"
        if "feedback" in self.weights:
            rates += f" or --feedback.lr (now {self.weights['feedback'].settings.lr:g})"
        position = self.position
        raise DivergenceError(
            f"the loss is {value} in epoch {position.epoch + 1}, batch {position.batch + 1}: {where}; "
            f"lower {rates}, or clip gradients with --forward.clip 1"
        )
