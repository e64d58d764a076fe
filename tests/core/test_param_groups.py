"""Parameter groups: every parameter in one of them, feedback apart, norms and biases without decay."""

from __future__ import annotations

import torch
from torch import nn

import feedbackward as fb

X = torch.randn(5, 4)


def learner(rule: fb.Rule) -> fb.Learner:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))
    return fb.attach(model, rule, example=X)


def names(learner: fb.Learner, groups: list) -> dict[str, list[str]]:
    known = {id(p): name for name, p in learner.named_parameters()}
    return {g["name"]: [known[id(p)] for p in g["params"]] for g in groups}


def test_groups_hold_every_parameter_once() -> None:
    one = learner(fb.DKP.published())
    groups = fb.param_groups(one, {"lr": 0.1, "weight_decay": 0.2}, {"lr": 0.3}, no_decay=True)
    assert names(one, groups) == {
        "model": ["model.0.weight", "model.3.weight"],
        "model without decay": ["model.0.bias", "model.1.weight", "model.1.bias", "model.3.bias"],
        "feedback": [f"feedback.{name}" for name, _ in one.feedback.named_parameters()],
    }
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (0.1, 0.2), (0.1, 0.0), (0.3, 0.05),
    ]  # fmt: skip


def test_a_function_chooses_by_the_models_names() -> None:
    one = learner(fb.DFA())
    groups = fb.param_groups(one, no_decay=lambda name, p: name == "0.weight")
    assert names(one, groups)["model without decay"] == ["model.0.weight"]
    assert list(names(one, fb.param_groups(one))) == ["model"]
    assert len(fb.param_groups(one)[0]["params"]) == 6
