"""Hugging Face's Trainer takes a model that was attached in place as it takes any other."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from client_nets import arguments, batch, bert, gpt2, needed, vit
from torch import nn

import feedbackward as fb

pytestmark = pytest.mark.clients
needed("accelerate")
transformers = needed("transformers")

RULES = (fb.DFA(), fb.DKP.published(), fb.DKP())


def placed(model: nn.Module, rule: fb.Rule, data: list[dict[str, Any]]) -> fb.Learner:
    return fb.attach(model, rule, example=batch(data, False), sites="blocks", in_place=True)


def trained_by_hand(
    model: nn.Module, rule: fb.Rule, data: list[dict[str, Any]], steps: int, clip: float = 0.0
) -> dict[str, torch.Tensor]:
    """The parameters of a learner after some steps of SGD on the whole data."""
    learner = fb.attach(copy.deepcopy(model), rule, example=batch(data, False), sites="blocks")
    optimizer = torch.optim.SGD(fb.param_groups(learner), lr=0.1)
    # the trainer asks for a mean over all labels, also of models that shift them
    inputs = {**batch(data), "num_items_in_batch": batch(data)["labels"].numel()}
    for _ in range(steps):
        optimizer.zero_grad()
        learner(**inputs).loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(learner.model.parameters(), clip)
        optimizer.step()
    return dict(learner.named_parameters())


def assert_same(learner: fb.Learner, expected: dict[str, torch.Tensor], tolerance: float) -> None:
    for name, p in learner.named_parameters():
        torch.testing.assert_close(p, expected[name], rtol=tolerance, atol=tolerance)


def train(learner: fb.Learner, data: list[dict[str, Any]], settings: Any, **own: Any) -> None:
    optimizer = torch.optim.SGD(fb.param_groups(learner), lr=0.1)
    trainer = transformers.Trainer(
        model=learner.model, args=settings, train_dataset=data, optimizers=(optimizer, None)
    )
    for name, value in own.items():
        setattr(trainer, name, value)
    trainer.train()


@pytest.mark.parametrize("make", [vit, bert, gpt2])
@pytest.mark.parametrize("rule", RULES, ids=("dfa", "dkp_published", "dkp"))
def test_the_trainer_trains_by_the_rule(make: Any, rule: fb.Rule, tmp_path: Path) -> None:
    model, data = make()
    expected = trained_by_hand(model, rule, data, steps=2)
    learner = placed(model, rule, data)
    whole = {"per_device_train_batch_size": len(data), "num_train_epochs": 2}
    train(learner, data, arguments(tmp_path, **whole))
    assert_same(learner, expected, 1e-10)
    saved = type(model).from_pretrained(tmp_path / "checkpoint-2", dtype=torch.float64)
    assert saved.state_dict().keys() == model.state_dict().keys()
    for name, value in saved.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


@pytest.mark.parametrize(("make", "size"), [(vit, 6), (gpt2, 6), (bert, 4)])
def test_accumulated_batches_are_the_whole_one(make: Any, size: int, tmp_path: Path) -> None:
    """The last batch is smaller where the model's loss can be a mean over all of them; BERT's cannot."""
    model, data = make()
    expected = trained_by_hand(model, fb.DFA(), data, steps=1)
    learner = placed(model, fb.DFA(), data)
    several = {"per_device_train_batch_size": size, "gradient_accumulation_steps": -(-16 // size)}
    mean_of_means = False if make is bert else None
    train(learner, data, arguments(tmp_path, **several), loss_is_scaled_for_ga=mean_of_means)
    assert_same(learner, expected, 1e-10)


def test_clipping_is_that_of_the_model(tmp_path: Path) -> None:
    model, data = vit()
    rule, clip = fb.DKP.published(), 0.01
    expected = trained_by_hand(model, rule, data, 1, clip)
    free = trained_by_hand(model, rule, data, 1)
    learner = placed(model, rule, data)
    train(learner, data, arguments(tmp_path, per_device_train_batch_size=16, max_grad_norm=clip))
    assert_same(learner, expected, 1e-10)
    head = "model.classifier.weight"
    assert not torch.allclose(expected[head], free[head], atol=1e-6)


def test_activation_checkpointing_changes_nothing(tmp_path: Path) -> None:
    model, data = vit()
    expected = trained_by_hand(model, fb.DKP.published(), data, 1)
    learner = placed(model, fb.DKP.published(), data)
    again = {"activation_checkpointing": True, "per_device_train_batch_size": 16}
    train(learner, data, arguments(tmp_path, **again))
    assert model.is_activation_checkpointing
    assert_same(learner, expected, 1e-10)


@pytest.mark.parametrize("rule", RULES, ids=("dfa", "dkp_published", "dkp"))
def test_bf16_is_near(rule: fb.Rule, tmp_path: Path) -> None:
    model, data = vit()
    model = model.float()
    data = [{**row, "pixel_values": row["pixel_values"].float()} for row in data]
    before = copy.deepcopy(model.state_dict())
    expected = trained_by_hand(model, rule, data, 1)
    learner = placed(model, rule, data)
    train(learner, data, arguments(tmp_path, bf16=True, per_device_train_batch_size=16))
    for name, p in model.named_parameters():
        moved, meant = p - before[name], expected[f"model.{name}"] - before[name]
        assert torch.norm(moved - meant) <= 0.05 * torch.norm(meant) + 1e-6, name


def test_peft_trains_its_adapters_alone(tmp_path: Path) -> None:
    peft = needed("peft")
    model, data = vit()
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(model, config)
    expected = trained_by_hand(model, fb.DFA(), data, 1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    learner = placed(model, fb.DFA(), data)
    train(learner, data, arguments(tmp_path, per_device_train_batch_size=16))
    assert_same(learner, expected, 1e-10)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    # the other factor begins at zero, so that the first step moves one of each pair
    assert moved == {n for n in before if "lora_B" in n or "classifier.modules_to_save" in n}
    saved = tmp_path / "checkpoint-1"
    assert (saved / "adapter_model.safetensors").exists()
    assert not (saved / "model.safetensors").exists()
