"""Hugging Face's `Trainer` with a learner: the model trains in place, and the feedback gets what it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from feedbackward.integrations.passes import Passes, labels_of, loss_of
from feedbackward.learner import Learner

# stands for the class that the user mixes in, so that this file needs no import of it
Trainer: Any = object


class FeedbackMixin(Trainer):
    """For `class FeedbackTrainer(FeedbackMixin, Trainer)`, which trains a model that was attached with `in_place=True`.

    The optimizer has a group for learned feedback. Checkpoints have `feedback.safetensors` beside the model's own file, and
    resuming reads it. Rules with a phase run it before the optimizer steps. Rules with targets get the labels, with the
    factor that the loss has under accumulation. `max_grad_norm` clips the gradients of the model, and not the feedback's.

    Args:
        learner: what `attach` returned. Its model is the trainer's.
        feedback: options of the feedback's group, for example `{"lr": 0.01}`. By default it has the rate and the decay of W.
        targets: takes the targets from the inputs of a batch, for rules that need them; by default the labels, if `[N]`.
        feedback_every, probe_every: steps between two phases; between two probes, which log the angle to backprop at every site.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
        >>> import feedbackward as fb
        >>> from feedbackward.integrations.huggingface import FeedbackMixin
        >>> class FeedbackTrainer(FeedbackMixin, Trainer):
        ...     pass
        >>> config = BertConfig(
        ...     vocab_size=10, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
        ... )
        >>> model = BertForSequenceClassification(config)
        >>> data = [{"input_ids": torch.arange(6) + i, "labels": i % 2} for i in range(4)]
        >>> example = {"input_ids": torch.stack([row["input_ids"] for row in data])}
        >>> learner = fb.attach(model, fb.DRTP(), example=example, sites="blocks", in_place=True)
        >>> folder = tempfile.mkdtemp()
        >>> settings = TrainingArguments(folder, max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True)
        >>> trainer = FeedbackTrainer(learner=learner, args=settings, train_dataset=data)
        >>> _ = trainer.train()  # doctest: +ELLIPSIS
        {'train_runtime': ...}
        >>> trainer.state.global_step
        1
    """

    def __init__(
        self,
        *args: Any,
        learner: Learner,
        feedback: dict[str, Any] | None = None,
        targets: Callable[[Mapping[str, Any]], Tensor] | None = None,
        feedback_every: int = 1,
        probe_every: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs if args else {"model": learner.model, **kwargs})
        self.learner, self._options, self._targets = learner, feedback or {}, targets or labels_of
        loss = not (self.compute_loss_func or self.label_smoother)
        self._passes = Passes(learner, feedback_every, probe_every, loss)
        self._refuse()
        # the trainer moved the model alone
        learner.feedback.to(self.args.device)

    def _refuse(self) -> None:
        whole = self.learner.trains_in_place and self.model is self.learner.model
        shards = self.is_fsdp_enabled or self.is_deepspeed_enabled
        phase, several = self.learner.attached.in_phase, self.args.gradient_accumulation_steps > 1
        problems = {
            "attach with in_place=True, and give the trainer no other model": not whole,
            "FSDP and DeepSpeed would leave the feedback out: use DDP": shards,
            "fp16's GradScaler does not reach the phase: use bf16=True": phase and self.args.fp16,
            "its phase takes one batch: use gradient_accumulation_steps=1": several
            and self._passes.revises,
        }
        self._passes.refuse(problems)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own optimizer, with a group for the feedback."""
        options = {"weight_decay": self.args.weight_decay, **self._options}
        return self._passes.add_group(super().create_optimizer(*args, **kwargs), options)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One pass and its backward pass; the phase follows the last one of a step."""
        if self.learner.attached.needs_target:
            y = self._targets(inputs).to(self.args.device)
            self._passes.target(y, self._factor(y, num_items_in_batch))
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._passes.phase(self.state.global_step, loss_of)
            if angles := self._passes.angles(self.state.global_step, loss_of):
                self.log(angles)
            self._passes.end_step()
        return loss

    def _factor(self, y: Tensor, items: Any) -> float:
        """The share of this batch in the loss of the whole step."""
        scaled = self.model_accepts_loss_kwargs or self.compute_loss_func
        if items is None or not scaled or getattr(self, "loss_is_scaled_for_ga", None) is False:
            return 1 / self.current_gradient_accumulation_steps
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return ranks * float((y != -100).sum()) / float(items)

    def _save(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        super()._save(output_dir, *args, **kwargs)
        if self.args.should_save:
            self._passes.save(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        self._passes.load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._passes.load(self.state.best_model_checkpoint)
