"""Schedules on the experiments' nets, under autocast, and what they hold in memory."""

from __future__ import annotations

import pytest
import torch
from pairs import F64, loss_fn
from test_schedules import assert_same, outcome
from torch import nn
from torch.nn import functional as F

import feedbackward as fb
from feedbackward.experiment import nets
from feedbackward.experiment.training.measure import LiveBytes


@pytest.mark.parametrize("name", ["vgg6", "resnet20", "small_cnn"])
def test_replay_of_real_nets(name: str) -> None:
    torch.manual_seed(0)
    model = nets.build(name, (3, 16, 16), 5).to(F64)
    batch = (torch.randn(4, 3, 16, 16, dtype=F64), torch.randint(5, (4,)))
    for hold in (True, False, "inputs"):
        joint, replay = (
            outcome(model, fb.DKP.published(), batch, s, hold=hold) for s in ("joint", "replay")
        )
        assert_same(joint, replay)


@pytest.mark.parametrize("schedule", ["joint", "replay"])
def test_bf16_autocast_around_the_call(schedule: str) -> None:
    """Weights that were cast in the pass without gradients must not be taken for trained ones."""
    torch.manual_seed(0)
    model = nets.build("small_cnn", (1, 12, 12), 5)
    x, y = torch.randn(6, 1, 12, 12), torch.randint(5, (6,))
    learner = fb.attach(model, fb.DKP.published(), example=x)
    for _ in range(2):
        learner.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            learner.backward(x, lambda out: F.cross_entropy(out.float(), y), schedule=schedule)
        got = [p.grad.clone() for p in learner.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(learner(x).float(), y)
    learner.zero_grad()
    loss.backward()
    for p, grad in zip(learner.parameters(), got, strict=True):
        assert torch.allclose(p.grad, grad, rtol=0.05, atol=0.02 * p.grad.abs().max().item())
        assert grad.any()


def activation_peak(depth: int, rule: fb.Rule, schedule: str) -> int:
    """Bytes alive at the worst moment of a backward, without weights and gradients."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(64, 64, bias=False), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(64, 2))
    x, y = torch.randn(256, 64), torch.randint(2, (256,))
    learner = fb.attach(model, rule, example=x)

    def step() -> None:
        if rule.needs == "target":
            learner.target(y)
        learner.backward(x, loss_fn(y), schedule=schedule)  # type: ignore[arg-type]

    step()  # rehearses, and makes the gradients
    kept = [t for p in learner.parameters() for t in (p, p.grad) if t is not None]
    with LiveBytes([*kept, *learner.buffers(), x, y]) as live:
        start = live.now
        step()
    return live.peak - start


@pytest.mark.parametrize(
    ("rule", "schedule"),
    [(fb.DKP.published(), "replay"), (fb.DFA(), "replay"), (fb.DRTP(), "eager")],
)
def test_memory_does_not_grow_with_depth(rule: fb.Rule, schedule: str) -> None:
    shallow, twice = activation_peak(12, rule, schedule), activation_peak(24, rule, schedule)
    assert twice <= 1.02 * shallow
    backprop = activation_peak(24, fb.BP(), "joint")
    assert backprop > 1.8 * activation_peak(12, fb.BP(), "joint")
    assert twice < 0.4 * backprop
