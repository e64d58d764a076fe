"""A training step of any rule, as its contract asks for it: targets, a phase of its own, gradients that come late."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor, nn

import feedbackward as fb
from feedbackward.schedules import preparation


def give_gradients(
    learner: fb.Learner,
    x: Tensor,
    y: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    call: nn.Module | None = None,
) -> Tensor:
    """Forward, backward and, where the rule has one, the feedback's phase; returns the output. `call`: a wrapped learner."""
    if learner.attached.needs_target:
        learner.target(y)
    output = (call or learner)(x)
    loss(output, y).backward()
    if learner.attached.in_phase:
        learner.feedback_step(x, lambda out: loss(out, y))
    return output.detach()


def staleness(learner: fb.Learner) -> fb.Delayed | None:
    """The schedule without which a preset of rule and schedule trains nothing."""
    return fb.Delayed(learner) if isinstance(learner.rule, fb.rules.DSP) else None


def train(
    learner: fb.Learner,
    x: Tensor,
    y: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    steps: int = 1,
    lr: float = 0.05,
) -> dict[str, Tensor | None]:
    """The model's gradients at the last of these steps of plain SGD, as the optimizer gets them. Late ones are waited for."""
    optimizer = torch.optim.SGD(learner.parameters(), lr=lr)
    stale = staleness(learner)
    for _ in range(steps + max(stale.delays if stale else [0])):
        optimizer.zero_grad()
        give_gradients(learner, x, y, loss)
        if stale is not None:
            stale.exchange()
        optimizer.step()
    return {
        n: None if p.grad is None else p.grad.clone() for n, p in learner.model.named_parameters()
    }


def repeating_all() -> contextlib.AbstractContextManager[object]:
    """Replay repeats the pass as a whole, wherever it could hold a part of it."""
    return mock.patch.object(preparation, "_hold", return_value=None)
