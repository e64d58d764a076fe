"""The search of rates: the same number of trials for every rule that is searched, judged on held-out images."""

from __future__ import annotations

import math
from typing import Any

from feedbackward.errors import DivergenceError
from feedbackward.experiment.config.schema import Search


def trial_rates(search: Search, learned: bool) -> list[tuple[float, float | None]]:
    """The (lr, feedback_lr) to try for a rule.

    A rule that learns its feedback tries every pair. One that does not has only the rate of W to choose; it
    spends the same number of trials on a finer geometric grid between the same ends (where it is searched alone,
    and has nobody to be equal to, it tries the rates that are given).
    """
    if learned:
        return [(lr, feedback_lr) for lr in search.lr for feedback_lr in search.feedback_lr]
    if search.baseline_only:
        return [(lr, None) for lr in search.lr]
    low, high = math.log(min(search.lr)), math.log(max(search.lr))
    count = len(search.lr) * len(search.feedback_lr) if low < high else 1
    steps = max(1, count - 1)
    return [(math.exp(low + (high - low) * i / steps), None) for i in range(count)]


def pick(trials: list[dict[str, Any]], label: str) -> tuple[float, float | None]:
    """The rates of the trial with the highest held-out accuracy; the earlier one of equals.

    Raises:
        DivergenceError: no trial finished.
    """
    finished = [trial for trial in trials if trial["validation_accuracy"] is not None]
    if not finished:
        raise DivergenceError(
            f"every trial of {label} diverged: search lower rates with --search.lr"
        )
    best = max(finished, key=lambda trial: trial["validation_accuracy"])
    return best["lr"], best["feedback_lr"]
