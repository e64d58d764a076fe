"""What a training loop that knows of no feedback leaves out: targets before a pass, and the phase after it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from feedbackward.engine.transparent import Inert
from feedbackward.errors import FeedbackError
from feedbackward.learner import Learner
from feedbackward.measure.probe import probe
from feedbackward.model.example import Given, copied

FILE = "feedback.safetensors"


class Passes(Inert):
    """Gives a learner its targets, and runs the phase of its feedback on the inputs of its last training pass.

    feedback_every, probe_every: the steps between two phases, and between two probes (0: never).
    loss: whether the caller can give the loss of an output, without which neither a probe nor a phase that revises can run.
    """

    def __init__(
        self, learner: Learner, feedback_every: int = 1, probe_every: int = 0, loss: bool = True
    ) -> None:
        if feedback_every < 1 or probe_every < 0:
            raise FeedbackError(
                f"feedback_every={feedback_every} must be at least 1, and probe_every={probe_every} at least 0."
            )
        # whether the phase changes the gradients of the weights, and needs the loss for it
        self.revises = any(rule.revises for rule in learner.attached.rules)
        self.learner = learner
        self._hook: RemovableHandle | None = None
        without = {
            "the probe needs the loss of an output, which is not given here": probe_every,
            "the phase needs the loss of an output, which is not given here": self.revises,
        }
        if not loss:
            self.refuse(without)
        self.feedback_every, self.probe_every = feedback_every, probe_every
        self._inputs: Given | None = None
        self._target: tuple[Tensor, float] | None = None
        if learner.attached.in_phase or probe_every:
            self._hook = learner.model.register_forward_pre_hook(self, with_kwargs=True)
            learner.attached.handles.append(self._hook)

    def refuse(self, problems: Mapping[str, Any]) -> None:
        """Raise FeedbackError for the first problem that is there."""
        for problem, here in problems.items():
            if here:
                self.remove()
                raise FeedbackError(f"{self.learner.rule.label} in this trainer: {problem}.")

    def __call__(self, model: Any, args: Any, kwargs: Any) -> None:
        """Keep the inputs of a training pass. The model may change those it got."""
        if torch.is_grad_enabled() and not self.learner.attached.own_passes:
            self._inputs = copied(Given(args, kwargs))

    def add_group(self, optimizer: torch.optim.Optimizer, options: dict[str, Any]) -> Any:
        """The optimizer, with a group for the learned feedback that it does not hold yet."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        learned = [p for p in self.learner.feedback.parameters() if id(p) not in held]
        if learned:
            optimizer.add_param_group({"params": learned, **options})
        return optimizer

    def target(self, labels: Tensor, scale: float) -> None:
        """The labels of the next pass, and the factor that the tool gives its loss."""
        self._target = labels, scale
        self.learner.target(labels, scale)

    def phase(self, step: int, loss_fn: Callable[[Any], Tensor] | None = None) -> None:
        """After the last backward pass of an optimizer step: run the phase, if the step's number says so."""
        due = self.learner.attached.in_phase and step % self.feedback_every == 0
        if due and self._inputs is not None:
            self.learner.feedback_step(self._inputs, loss_fn)

    def angles(self, step: int, loss_fn: Callable[[Any], Tensor] | None) -> dict[str, float]:
        """The angle to backprop at every site, in degrees, if the step's number says so."""
        due = self.probe_every and step % self.probe_every == 0
        if not due or self._inputs is None or loss_fn is None:
            return {}
        if self._target:
            self.learner.target(*self._target)
        found = probe(self.learner, loss_fn, self._inputs, jacobian=False).sites
        rows = {f"angle/{name}": row.angle for name, row in found.items()}
        return {name: angle for name, angle in rows.items() if math.isfinite(angle)}

    def remove(self) -> None:
        """Take the hook off the model."""
        if self._hook:
            self._hook.remove()
            handles = self.learner.attached.handles
            handles[:] = [handle for handle in handles if handle is not self._hook]
            self._hook = None

    def end_step(self) -> None:
        """Let go of the batch: an optimizer's step is over, and a second optimizer needs no phase of its own."""
        self._inputs = self._target = None

    def save(self, folder: str | Path) -> None:
        """Write the feedback beside the model's own file."""
        from safetensors.torch import save_model

        save_model(self.learner.feedback, str(Path(folder) / FILE))

    def load(self, folder: str | Path) -> None:
        """Read what `save` wrote. Raises FeedbackError where there is none."""
        from safetensors.torch import load_model

        path = Path(folder) / FILE
        if not path.exists():
            raise FeedbackError(
                f"{path} is missing: this checkpoint was saved without its feedback, and cannot be resumed."
            )
        load_model(self.learner.feedback, path)


def labels_of(inputs: Mapping[str, Any]) -> Tensor:
    """The labels of a batch, where it is plain which output each of them is for."""
    labels = inputs.get("labels")
    if labels is None or labels.dim() != 1:
        shape = None if labels is None else list(labels.shape)
        raise FeedbackError(
            f"the rule needs targets, and labels of shape {shape} do not say which (models of language shift theirs): give "
            "`targets=lambda inputs: ...`, class indices in the shape of the output without its classes, -100 for no target."
        )
    return labels


def loss_of(output: Any) -> Tensor:
    """The loss that a model has computed itself."""
    loss: Tensor = output["loss"] if isinstance(output, dict) else output[0]
    return loss
