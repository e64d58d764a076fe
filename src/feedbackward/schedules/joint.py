r"""Schedules: when the backward of each segment runs. A schedule is not a rule; it changes no gradient.

F is the work of the forward pass, G of the weight gradients, D of the input gradients; backprop does F + G + D.

joint: one backward pass over all segments follows the forward pass. Every segment's activities are in memory. F + G.
eager: a segment's backward pass runs inside the forward pass, as soon as this reaches the site. One segment is in memory.
    F + G. For rules whose signals need no error (DRTP, DGL, Frozen).
replay: a forward pass gives the error, and its lower part is repeated, segment by segment. As much as the largest segment
    is in memory. At most 2F + G.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from feedbackward.engine.attached import Attached
from feedbackward.engine.target import Target
from feedbackward.errors import AttachError
from feedbackward.model.example import run
from feedbackward.schedules.passes import Deliver, LossFn, finish, refuse_overlaps
from feedbackward.schedules.replay import replay

Schedule = Literal["joint", "replay", "eager"]


def backward(
    attached: Attached,
    inputs: Any,
    loss_fn: LossFn,
    target: Target | None,
    schedule: Schedule,
    keep_inputs: bool = False,
) -> Tensor:
    """Forward and backward by a schedule other than joint; see `Learner.backward`."""
    attached.follow_changes(inputs)
    if schedule == "replay":
        return replay(attached, inputs, loss_fn, target, keep_inputs)
    return _eager(attached, inputs, loss_fn, target)


def check_schedule(schedule: str, keep_inputs: bool) -> None:
    """Refuse names and options that no schedule has, and a backward without gradients."""
    if schedule not in get_args(Schedule):
        raise AttachError(
            f"unknown schedule {schedule!r}: choose one of {', '.join(get_args(Schedule))}."
        )
    if keep_inputs and schedule != "replay":
        raise AttachError(f'keep_inputs is an option of schedule="replay", not of {schedule!r}.')
    if not torch.is_grad_enabled():
        raise AttachError("learner.backward computes gradients: call it outside torch.no_grad().")


def _eager(attached: Attached, inputs: Any, loss_fn: LossFn, target: Target | None) -> Tensor:
    if attached.needs_error:
        raise AttachError(
            f"{attached.rule.label}'s signals are made from the output's error, which is known after the forward pass only: use "
            'schedule="replay", or a rule that needs no error (DRTP, DGL).'
        )
    refuse_overlaps(attached, "eager")
    attached.begin_pass(inputs, target)
    with attached.cuts.visiting(Deliver(attached.cuts, target, {}), target):
        output = run(attached.model, inputs)
    return finish(loss_fn(output))
