"""The mixin for Hugging Face's Trainer: group, targets, phase, angles and file of the feedback."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from client_nets import arguments, batch, bert, gpt2, needed, vit
from torch import nn

import feedbackward as fb
from feedbackward.errors import FeedbackError
from feedbackward.integrations.huggingface import FeedbackMixin

pytestmark = pytest.mark.clients
needed("accelerate")
transformers = needed("transformers")


class FeedbackTrainer(FeedbackMixin, transformers.Trainer):
    pass


def shifted(inputs: Any) -> torch.Tensor:
    """The next token of each; none for the last."""
    return torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)


Rows = list[dict[str, Any]]
WHOLE = {"per_device_train_batch_size": 16}


def placed(model: nn.Module, rule: fb.Rule, data: Rows, sites: str = "blocks") -> fb.Learner:
    return fb.attach(model, rule, example=batch(data, False), sites=sites, in_place=True)


def trainer_of(learner: fb.Learner, data: Rows, settings: Any, **options: Any) -> Any:
    return FeedbackTrainer(learner=learner, args=settings, train_dataset=data, **options)


def assert_same(learner: fb.Learner, expected: dict[str, torch.Tensor]) -> None:
    found = dict(learner.named_parameters())
    assert found.keys() == expected.keys()
    for name, p in found.items():
        torch.testing.assert_close(p, expected[name], rtol=1e-10, atol=1e-10)


def by_hand(model: nn.Module, rule: fb.Rule, data: Rows, steps: int = 1) -> Any:
    """The parameters of a learner after some steps on the whole data."""
    learner = fb.attach(copy.deepcopy(model), rule, example=batch(data, False), sites="blocks")
    groups = fb.param_groups(learner, feedback={"lr": 0.02}, no_decay=True)
    optimizer = torch.optim.SGD(groups, lr=0.1, weight_decay=0.3)
    inputs = batch(data)
    loss = lambda output: output.loss  # noqa: E731
    for _ in range(steps):
        optimizer.zero_grad()
        if learner.attached.needs_target:
            learner.target(inputs["labels"])
        loss(learner(**inputs)).backward()
        if learner.attached.in_phase:
            learner.feedback_step(inputs, loss)
        optimizer.step()
    return dict(learner.named_parameters())


@pytest.mark.parametrize("rule", [fb.DKP(), fb.DRTP(), fb.rules.DKPPC()], ids=lambda r: r.name)
@pytest.mark.parametrize("make", [vit, bert])
def test_group_targets_and_phase_are_those_of_a_loop_by_hand(
    make: Any, rule: fb.Rule, tmp_path: Path
) -> None:
    model, data = make()
    expected = by_hand(model, rule, data, steps=3)
    settings = arguments(tmp_path, weight_decay=0.3, num_train_epochs=3, **WHOLE)
    learner = placed(model, rule, data)
    trainer_of(learner, data, settings, feedback={"lr": 0.02}).train()
    assert_same(learner, expected)


def test_targets_are_scaled_as_the_loss_is(tmp_path: Path) -> None:
    """Batches of 6, 6 and 4."""
    model, data = vit()
    expected = by_hand(model, fb.DRTP(), data)
    learner = placed(model, fb.DRTP(), data)
    several = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 3}
    trainer_of(learner, data, arguments(tmp_path, weight_decay=0.3, **several)).train()
    assert_same(learner, expected)


def test_targets_are_scaled_where_the_loss_is_a_mean_of_means(tmp_path: Path) -> None:
    model, data = bert()
    expected = by_hand(model, fb.DRTP(), data)
    learner = placed(model, fb.DRTP(), data)
    several = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    trainer = trainer_of(learner, data, arguments(tmp_path, weight_decay=0.3, **several))
    trainer.loss_is_scaled_for_ga = False
    trainer.train()
    assert_same(learner, expected)


def test_models_of_language_say_their_targets(tmp_path: Path) -> None:
    model, data = gpt2()
    seen = []
    learner = placed(model, fb.DRTP(), data)
    learner.target = lambda y, scale: (seen.append(y), fb.Learner.target(learner, y, scale))  # type: ignore[method-assign]
    trainer_of(learner, data, arguments(tmp_path, **WHOLE), targets=shifted).train()
    ids = batch(data)["input_ids"]
    assert torch.equal(seen[0][:, :-1], ids[:, 1:])
    assert (seen[0][:, -1] == -100).all()

    learner.detach()
    again = placed(model, fb.DRTP(), data)
    with pytest.raises(FeedbackError, match="targets=lambda inputs"):
        trainer_of(again, data, arguments(tmp_path / "2", **WHOLE)).train()


@pytest.mark.parametrize("every", [1, 2])
def test_a_phase_for_every_step_not_for_every_batch(every: int, tmp_path: Path) -> None:
    model, data = vit()
    learner = placed(model, fb.rules.FDFA(), data)
    seen = []
    step = learner.feedback_step
    learner.feedback_step = lambda x, loss: (seen.append(x), step(x, loss))  # type: ignore[method-assign]
    several = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer_of(
        learner, data, arguments(tmp_path, weight_decay=0.3, **several), feedback_every=every
    ).train()
    assert len(seen) == 4 // every
    images = batch(data)["pixel_values"]
    for i, given in enumerate(seen):
        last = 4 * every * i + 2
        assert torch.equal(given.kwargs["pixel_values"], images[last : last + 2])
    # B of FDFA begins at zero, and learns in the phase alone
    assert all(p.abs().max() > 0 for p in learner.feedback.parameters())


def test_the_angles_are_those_of_the_probe(tmp_path: Path) -> None:
    model, data = vit()
    rules = (fb.DFA(), fb.DRTP())
    for rule in rules:
        learner = placed(copy.deepcopy(model), rule, data)
        inputs = batch(data)
        if rule.needs == "target":
            learner.target(inputs["labels"])
        expected = fb.probe(learner, lambda out: out.loss, inputs, jacobian=False)
        settings = arguments(tmp_path / rule.name, **WHOLE, num_train_epochs=3)
        trainer = trainer_of(learner, data, settings, probe_every=2)
        trainer.train()
        rows = [row for row in trainer.state.log_history if any("angle" in key for key in row)]
        assert [row["step"] for row in rows] == [0, 2]
        for name, site in expected.sites.items():
            assert rows[0][f"angle/{name}"] == pytest.approx(site.angle, abs=1e-4)


@pytest.mark.parametrize(
    "rule", [fb.DKP(), fb.rules.FDFA(), fb.DGL(hidden=4), fb.DFA()], ids=lambda rule: rule.name
)
@pytest.mark.parametrize("make", [bert, gpt2])
def test_a_resumed_run_is_the_same_bit_for_bit(make: Any, rule: fb.Rule, tmp_path: Path) -> None:
    """Not of ViT, whose checkpoints transformers 5.23 itself does not read: it renames keys as it saves them."""
    kept = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        model, data = make()
        if resume:
            # nothing of the first run is left but its checkpoint
            for p in model.parameters():
                p.data.normal_()
        learner = placed(model, rule, data)
        for p in learner.feedback.parameters():
            p.data.add_(0.0 if resume is None else 1.0)
        settings = arguments(tmp_path, optim="adamw_torch", learning_rate=0.01)
        targets = shifted if make is gpt2 else None
        trainer_of(learner, data, settings, targets=targets).train(resume_from_checkpoint=resume)
        kept.append({**model.state_dict(), **learner.feedback.state_dict(prefix="feedback.")})
    for name, value in kept[0].items():
        assert torch.equal(kept[1][name], value), name


def test_a_checkpoint_without_feedback_is_not_resumed(tmp_path: Path) -> None:
    model, data = vit()
    learner = placed(model, fb.DKP(), data)
    trainer_of(learner, data, arguments(tmp_path)).train()
    file = tmp_path / "checkpoint-2" / "feedback.safetensors"
    file.unlink()
    with pytest.raises(FeedbackError, match=r"feedback\.safetensors is missing"):
        trainer_of(learner, data, arguments(tmp_path)).train(
            resume_from_checkpoint=str(file.parent)
        )


def test_the_best_model_has_the_feedback_of_its_time(tmp_path: Path) -> None:
    model, data = vit()
    learner = placed(model, fb.DKP(), data)
    settings = arguments(
        tmp_path, num_train_epochs=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="epoch", greater_is_better=False,
    )  # fmt: skip
    # the measure is the epoch, so the first checkpoint is the best
    trainer = trainer_of(
        learner, data, settings, eval_dataset=data, compute_metrics=lambda p: {"epoch": 0}
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    from safetensors.torch import load_file

    for name, value in load_file(tmp_path / "checkpoint-2" / "feedback.safetensors").items():
        assert torch.equal(learner.feedback.state_dict()[name], value)


@pytest.mark.parametrize(
    ("rule", "changes", "options", "message"),
    [
        (fb.rules.FDFA(), {"fp16": True}, {}, "use bf16=True"),
        (fb.rules.DKPPC(), {"gradient_accumulation_steps": 2}, {}, "accumulation_steps=1"),
        (fb.DKP(), {"label_smoothing_factor": 0.1}, {"probe_every": 1}, "needs the loss"),
        (fb.DKP(), {}, {"feedback_every": 0}, "feedback_every=0"),
        (fb.DKP(), {}, {"model": nn.Linear(2, 2)}, "no other model"),
    ],
)
def test_what_it_cannot_do_is_refused_at_once(
    rule: fb.Rule, changes: Any, options: Any, message: str, tmp_path: Path
) -> None:
    model, data = vit()
    with pytest.raises(FeedbackError, match=message):
        trainer_of(placed(model, rule, data), data, arguments(tmp_path, **changes), **options)


def test_a_learner_that_is_not_in_place_is_refused(tmp_path: Path) -> None:
    model, data = vit()
    learner = fb.attach(model, fb.DKP(), example=batch(data, False), sites="blocks")
    with pytest.raises(FeedbackError, match="in_place=True"):
        trainer_of(learner, data, arguments(tmp_path))
