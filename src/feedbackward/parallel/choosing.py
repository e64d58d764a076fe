"""Where a learner is divided over the ranks: as the user says, or balanced."""

from __future__ import annotations

import warnings
from typing import Any

import torch.distributed as dist

from feedbackward.errors import AttachError
from feedbackward.learner import Learner
from feedbackward.parallel.division import Division, divide
from feedbackward.parallel.groups import Groups
from feedbackward.parallel.recording import record
from feedbackward.parallel.routes import refuse_common
from feedbackward.parallel.simulate import balanced
from feedbackward.parallel.split import cut_points, find_places, segment_times


def check_delay(learner: Learner, delay: int) -> None:
    """Raise AttachError for a delay that is out of range, or that the rule cannot have."""
    if not 0 <= delay <= 4:
        raise AttachError(f"delay must be from 0 to 4 steps, got {delay}.")
    tied = [edge for edge in learner.graph.edges if edge.shares or edge.forward_weight]
    if delay and tied:
        raise AttachError(
            f"{learner.rule.label} uses the weights of the forward pass for its feedback, of which a delayed step has "
            "copies: use delay=0, or direct feedback (DFA, DKP)."
        )


def choose_division(learner: Learner, example: Any, named: list[str], groups: Groups) -> Division:
    """The division at the named places, or where the slowest rank is as fast as it can be.

    Raises AttachError where the learner cannot be divided so.
    """
    places, chosen = find_places(learner, example, named)
    if len(places) < groups.size - 1:
        raise AttachError(
            f"{groups.size} ranks need {groups.size - 1} places to divide {type(learner.model).__name__} at, and it has "
            f"{len(places)}: start fewer ranks, or use more sites."
        )
    recording = record(learner.model, example, places)
    if named and groups.size > 1:
        if len(set(chosen)) != groups.size - 1:
            raise AttachError(
                f"{groups.size} ranks need {groups.size - 1} names in `cut`, got {len(chosen)}: {', '.join(named)}."
            )
        boundaries = tuple(sorted(chosen))
    elif groups.size > 1:
        times: list[Any] = [None]
        if groups.rank == 0:
            times[0] = segment_times(learner, example, places)
        dist.broadcast_object_list(times, group=groups.up, group_src=0)
        if groups.data is not None:  # all pipelines are divided alike
            dist.broadcast_object_list(times, group=groups.data, group_src=0)
        boundaries = balanced(times[0], groups.size)
    else:
        boundaries = ()
    division = divide(learner, recording, boundaries, example)
    refuse_common(division.routes)
    _warn_of_locks(learner, division)
    return division


def _warn_of_locks(learner: Learner, division: Division) -> None:
    """Say where a rule that cuts activities is divided at another one."""
    cut = cut_points(learner)
    places = [division.recording.places[index] for index in division.cut]
    uncut = [place.name for place in places if place.points not in cut]
    if cut and uncut:
        others = [place.name for place in division.recording.places if place.points in cut]
        warnings.warn(
            f"{learner.rule.label} does not cut the activity at {uncut[0]!r}, so the stage below waits for a gradient of its "
            f"size, as with backprop. Activities that it cuts: {', '.join(others)}.",
            RuntimeWarning,
            stacklevel=4,
        )
