r"""Schedules: when the backward of each segment runs. A schedule is not a rule; it changes no gradient.

F is the work of the forward pass, G of the weight gradients, D of the input gradients; backprop does F + G + D.

joint: one backward pass over all segments follows the forward pass. Every segment's activities are in memory. F + G.
eager: a segment's backward pass runs inside the forward pass, as soon as this reaches the site. One segment is in memory.
    F + G. For rules whose signals need no error (DRTP, DGL, Frozen).
replay: a forward pass gives the error, and its lower part is repeated, segment by segment. As much as the largest segment
    is in memory. At most 2F + G.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from feedbackward.errors import AttachError
from feedbackward.model.example import run
from feedbackward.schedules.passes import Deliver, LossFn, finish, refuse_overlaps
from feedbackward.schedules.replay import replay

if TYPE_CHECKING:
    from feedbackward.learner import Learner

Schedule = Literal["joint", "replay", "eager"]


def backward(
    learner: Learner, inputs: Any, loss_fn: LossFn, schedule: Schedule, keep_inputs: bool = False
) -> Tensor:
    """Forward and backward by a schedule; see `Learner.backward`."""
    ways: dict[str, Callable[[Learner, Any, LossFn], Tensor]] = {
        "joint": _joint,
        "replay": partial(replay, keep_inputs=keep_inputs),
        "eager": _eager,
    }
    if schedule not in ways:
        raise AttachError(f"unknown schedule {schedule!r}: choose one of {', '.join(ways)}.")
    if keep_inputs and schedule != "replay":
        raise AttachError(f'keep_inputs is an option of schedule="replay", not of {schedule!r}.')
    if not torch.is_grad_enabled():
        raise AttachError("learner.backward computes gradients: call it outside torch.no_grad().")
    return ways[schedule](learner, inputs, loss_fn)


def _joint(learner: Learner, inputs: Any, loss_fn: LossFn) -> Tensor:
    loss = loss_fn(run(learner, inputs))
    loss.backward()
    return loss.detach()


def _eager(learner: Learner, inputs: Any, loss_fn: LossFn) -> Tensor:
    if learner.rule.needs_error:
        raise AttachError(
            f"{learner.rule.label}'s signals are made from the output's error, which is known after the forward pass only: use "
            'schedule="replay", or a rule that needs no error (DRTP, DGL).'
        )
    refuse_overlaps(learner, "eager")
    target = learner.begin_pass(inputs)
    with learner.cuts.visiting(Deliver(learner.cuts, target, {}), target):
        output = run(learner.model, inputs)
    return finish(loss_fn(output))
