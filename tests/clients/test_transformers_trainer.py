"""Hugging Face's Trainer takes a model that was attached in place as it takes any other."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import feedbackward as fb

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

LR = 0.1


def vit() -> tuple[nn.Module, list[dict[str, Any]]]:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        image_size=16, patch_size=8, num_labels=4, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    data = [{"pixel_values": torch.randn(3, 16, 16), "labels": i % 4} for i in range(16)]
    return transformers.ViTForImageClassification(config), data


def gpt2() -> tuple[nn.Module, list[dict[str, Any]]]:
    """With an embedding that is tied to the head."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=16, n_layer=3, n_head=2, vocab_size=11, n_positions=8,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    ids = torch.randint(11, (16, 6))
    return transformers.GPT2LMHeadModel(config), [{"input_ids": row, "labels": row} for row in ids]


def batch(data: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([torch.as_tensor(row[key]) for row in data]) for key in data[0]}


def arguments(folder: Path, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4, "num_train_epochs": 1, "report_to": [], "use_cpu": True,
        "save_steps": 2, "disable_tqdm": True, "max_grad_norm": 0.0, "lr_scheduler_type": "constant",
        **changes,
    }  # fmt: skip
    return transformers.TrainingArguments(str(folder), **settings)


@pytest.mark.parametrize("make", [vit, gpt2])
@pytest.mark.parametrize("rule", [fb.DFA(), fb.DKP.published()], ids=lambda rule: rule.name)
def test_the_trainer_trains_by_the_rule(make: Any, rule: fb.Rule, tmp_path: Path) -> None:
    """All data in one batch, so that the order of the batches does not matter."""
    model, data = make()
    inputs = batch(data)
    example = {key: value for key, value in inputs.items() if key != "labels"}
    learner = fb.attach(copy.deepcopy(model), rule, example=example, sites="blocks")
    by_hand = torch.optim.SGD(fb.param_groups(learner), lr=LR)
    for _ in range(2):
        by_hand.zero_grad()
        # the loss is a mean over all labels, as the trainer asks for it
        count = (inputs["labels"] != -100).sum()
        learner(**inputs, num_items_in_batch=count).loss.backward()
        by_hand.step()

    placed = fb.attach(model, rule, example=example, sites="blocks", in_place=True)
    optimizer = torch.optim.SGD(fb.param_groups(placed), lr=LR)
    settings = arguments(tmp_path, per_device_train_batch_size=len(data), num_train_epochs=2)
    trainer = transformers.Trainer(
        model=model, args=settings, train_dataset=data, optimizers=(optimizer, None)
    )
    trainer.train()
    expected = dict(learner.named_parameters())
    for name, p in placed.named_parameters():
        torch.testing.assert_close(p, expected[name], rtol=1e-4, atol=1e-6)
    saved = type(model).from_pretrained(tmp_path / "checkpoint-2")
    for name, p in saved.named_parameters():
        torch.testing.assert_close(p, dict(model.named_parameters())[name])


def test_accumulated_batches_are_the_whole_one(tmp_path: Path) -> None:
    found = []
    for size, steps in ((16, 1), (4, 4)):
        model, data = vit()
        example = {"pixel_values": batch(data)["pixel_values"]}
        placed = fb.attach(model, fb.DFA(), example=example, sites="blocks", in_place=True)
        optimizer = torch.optim.SGD(fb.param_groups(placed), lr=LR)
        settings = arguments(
            tmp_path / str(size),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )
        transformers.Trainer(
            model=model, args=settings, train_dataset=data, optimizers=(optimizer, None)
        ).train()
        found.append(model.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-6)
