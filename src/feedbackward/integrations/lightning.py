"""A Lightning callback for the learners of a LightningModule."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from feedbackward.errors import FeedbackError
from feedbackward.integrations.passes import Passes
from feedbackward.learner import Learner

try:
    import lightning.pytorch as pl
except ImportError as error:
    raise ImportError(
        "feedbackward.integrations.lightning needs Lightning: pip install 'feedbackward[lightning]'"
    ) from error


class FeedbackCallback(pl.Callback):
    """Gives the learners of a LightningModule their targets, runs the phase of their feedback, and logs their angles.

    The LightningModule holds each learner (`self.learner = fb.attach(...)`), so that Lightning saves, loads and moves its
    feedback, and gives its optimizer `fb.param_groups(self.learner)`. Rules without targets or a phase need no callback.

    Args:
        targets: takes the targets from a batch, for rules that need them; by default the last item of a tuple.
        loss: `loss(output, batch) -> scalar`, of the learner's output; for the probe, and for rules whose phase needs it.
        feedback_every: steps between two phases.
        probe_every: steps between two probes, which log the angle to backprop at every site; 0 logs none.

    Example:
        >>> import lightning.pytorch as pl
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> from feedbackward.integrations.lightning import FeedbackCallback
        >>> class Classifier(pl.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        ...         self.learner = fb.attach(net, fb.DRTP(), example=torch.randn(2, 4))
        ...     def training_step(self, batch, index):
        ...         x, y = batch
        ...         return nn.functional.cross_entropy(self.learner(x), y)
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(fb.param_groups(self.learner), lr=0.1)
        >>> rows = [(torch.randn(4), i % 2) for i in range(8)]
        >>> trainer = pl.Trainer(
        ...     max_epochs=1, callbacks=[FeedbackCallback()], accelerator="cpu", logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ... )
        >>> trainer.fit(Classifier(), torch.utils.data.DataLoader(rows, batch_size=4))
        >>> trainer.global_step
        2
    """

    def __init__(
        self,
        targets: Callable[[Any], Tensor] | None = None,
        loss: Callable[[Any, Any], Tensor] | None = None,
        feedback_every: int = 1,
        probe_every: int = 0,
    ) -> None:
        self.targets, self.loss = targets or (lambda batch: batch[-1]), loss
        self.feedback_every, self.probe_every = feedback_every, probe_every
        self._passes: dict[str, Passes] = {}
        self._loss_fn: Callable[[Any], Tensor] | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the learners."""
        # those of a fit that ended by an error
        self.on_fit_end(trainer, pl_module)
        found = {name: m for name, m in pl_module.named_modules() if isinstance(m, Learner)}
        if not found:
            raise FeedbackError(
                f"{type(pl_module).__name__} holds no Learner: write `self.learner = fb.attach(...)` in its __init__."
            )
        for name, learner in found.items():
            every = self.feedback_every, self.probe_every
            passes = Passes(learner, *every, loss=self.loss is not None)
            several = passes.revises and trainer.accumulate_grad_batches > 1
            passes.refuse({"its phase takes one batch: use accumulate_grad_batches=1": several})
            self._passes[name] = passes

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Targets, with the factor that Lightning gives the loss."""
        self._loss_fn = partial(_of_batch, self.loss, batch) if self.loss else None
        for passes in self._passes.values():
            if passes.learner.attached.needs_target:
                passes.target(self.targets(batch), 1 / trainer.accumulate_grad_batches)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any
    ) -> None:
        """The phase and the probe, once for all the batches of a step."""
        # Lightning counts the steps of every optimizer
        step = trainer.global_step // len(trainer.optimizers)
        for name, passes in self._passes.items():
            passes.phase(step, self._loss_fn)
            for key, angle in passes.angles(step, self._loss_fn).items():
                pl_module.log(f"{name}/{key}", angle)
            passes.end_step()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of the learners."""
        for passes in self._passes.values():
            passes.remove()
        self._passes.clear()


def _of_batch(loss: Callable[[Any, Any], Tensor], batch: Any, output: Any) -> Tensor:
    return loss(output, batch)
