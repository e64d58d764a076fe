"""The rules of a comparison, the configs of their runs, and the trials that pick their rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from feedbackward.errors import ConfigError, DivergenceError
from feedbackward.experiment.config.schema import (
    CompareConfig,
    RuleEntry,
    Search,
    TrainConfig,
    slug,
)
from feedbackward.experiment.config.tasks import goodness, value_of
from feedbackward.experiment.training.building import make_rule

BASELINE = "bp"  # comes first, and times and memory are relative to it


@dataclass(frozen=True)
class Candidate:
    """A rule of a comparison under its label.

    Attributes:
        learned: whether it learns feedback that has a rate of its own.
        trials: the trials by which its rates were picked.
        refused: why it cannot be run here.
    """

    entry: RuleEntry
    label: str
    learned: bool
    trials: list[dict[str, Any]] = field(default_factory=list)
    refused: str | None = None


def find_candidates(config: CompareConfig) -> list[Candidate]:
    """The rules in order, the baseline first, each with its own label.

    Raises ConfigError for a rule or an option that does not exist, and for a label that is used twice.
    """
    made = []
    for entry in sorted(config.entries(), key=lambda entry: entry.rule != BASELINE):
        rule = make_rule(entry.rule, entry.options)
        shown = {**entry.options, **entry.conditions()}
        options = ", ".join(f"{key}={value}" for key, value in shown.items())
        label = entry.label or rule.label + (f" ({options})" if options else "")
        made.append(Candidate(entry, label, rule.learned and not rule.one_rate))
    names = [slug(candidate.label) for candidate in made]
    for name, candidate in zip(names, made, strict=True):
        if names.count(name) > 1:
            raise ConfigError(
                f"two rules have the label '{candidate.label}': give each its own label"
            )
    return made


def run_config(config: CompareConfig, candidate: Candidate, seed: int) -> TrainConfig:
    """The run of one rule and seed, to be resumed where it exists."""
    out = f"{config.out}/{slug(candidate.label)}-s{seed}"
    run = config.cell(candidate.entry, seed)
    return replace(run, out=out, overwrite=False, resume=True).resolved()


def trial_configs(config: CompareConfig, candidate: Candidate) -> list[tuple[str, TrainConfig]]:
    """The trials of a rule's rates: what each is called, and its run."""
    found = trial_rates(config.search, candidate.learned)
    return [trial_config(config, candidate, *rates) for rates in found]


def trial_config(
    config: CompareConfig,
    candidate: Candidate,
    lr: float,
    feedback_lr: float | None,
    mark: str = "",
) -> tuple[str, TrainConfig]:
    """One trial: what it is called, and its run, in a folder that ends with `mark`."""
    rates = "-".join(f"{rate:.6g}" for rate in (lr, feedback_lr) if rate is not None)
    entry = replace(candidate.entry, lr=lr, feedback_lr=feedback_lr)
    trial = replace(
        config.cell(entry, config.search.seed),
        out=f"{config.out}/search/{slug(candidate.label)}-{rates}{mark}",
        overwrite=False,
        resume=True,
        epochs=config.search.epochs,
        probe_every=0,
        tensorboard=False,
        logger=None,
    ).resolved()
    return f"{candidate.label}, {rates_in_words(lr, feedback_lr)}", trial


def trial_rates(search: Search, learned: bool) -> list[tuple[float, float | None]]:
    """The (lr, feedback_lr) to try for a rule.

    A rule whose feedback has a rate of its own tries every pair. Another has only the rate of W to
    choose. It spends the same number of trials on a finer geometric grid between the same ends. If
    only the baseline is searched, no other rule needs as many trials, and it tries the given rates.
    """
    if learned:
        return [(lr, feedback_lr) for lr in search.lr for feedback_lr in search.feedback_lr]
    if search.baseline_only:
        return [(lr, None) for lr in search.lr]
    low, high = math.log(min(search.lr)), math.log(max(search.lr))
    count = len(search.lr) * len(search.feedback_lr) if low < high else 1
    steps = max(1, count - 1)
    return [(math.exp(low + (high - low) * i / steps), None) for i in range(count)]


def rates_in_words(lr: float, feedback_lr: float | None) -> str:
    """The rates of W and, where it is learned, of B."""
    return f"lr {lr:.3g}" + ("" if feedback_lr is None else f", feedback lr {feedback_lr:.3g}")


def rates_of(config: TrainConfig, learned: bool) -> dict[str, float | None]:
    """A run's rates of W and of B."""
    return {"lr": config.forward.lr, "feedback_lr": config.feedback.lr if learned else None}


def pick(trials: Sequence[dict[str, Any]], label: str) -> tuple[float, float | None]:
    """The rates of the trial that is best on held-out data; the earlier one of equals.

    Raises:
        DivergenceError: no trial finished.
    """
    finished = [trial for trial in trials if value_of(trial, "validation") is not None]
    if not finished:
        raise DivergenceError(
            f"every trial of {label} diverged: search lower rates with --search.lr"
        )
    best = max(finished, key=lambda trial: goodness(trial, "validation"))
    return best["lr"], best["feedback_lr"]


def at_best_rates(candidate: Candidate, trials: list[dict[str, Any]]) -> Candidate:
    """The candidate at the rates of its best trial; refused if every trial diverged."""
    try:
        lr, feedback_lr = pick(trials, candidate.label)
    except DivergenceError as error:  # one rule must not stop the others
        return replace(candidate, trials=trials, refused=str(error))
    entry = replace(candidate.entry, lr=lr, feedback_lr=feedback_lr)
    return replace(candidate, entry=entry, trials=trials)


def at_rates_of(found: Candidate, candidate: Candidate) -> Candidate:
    """The candidate at the rates that its own search found, or at the rate of W that another's found."""
    if found.label == candidate.label:
        entry = replace(candidate.entry, lr=found.entry.lr, feedback_lr=found.entry.feedback_lr)
        return replace(candidate, entry=entry, trials=found.trials, refused=found.refused)
    if found.refused:
        reason = f"no rate was found for it, {found.label}: {found.refused}"
        return replace(candidate, refused=reason)
    return replace(candidate, entry=replace(candidate.entry, lr=found.entry.lr))
