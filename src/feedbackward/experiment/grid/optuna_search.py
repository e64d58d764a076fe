"""Trials whose rates Optuna suggests, and the pruning of bad ones.

There is no store beside the folders of the trials. A study with the same seed suggests the same rates when it is told the
same results, so it is made again from the folders whenever it is needed: after Ctrl-C, or in the process of a trial.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from feedbackward.errors import ConfigError
from feedbackward.experiment.config.schema import CompareConfig, TrainConfig
from feedbackward.experiment.config.search import Search
from feedbackward.experiment.config.tasks import KINDS
from feedbackward.experiment.grid.candidates import Candidate, trial_config
from feedbackward.experiment.grid.cells import ENDED, run_record

# random trials before the sampler models what it was told, and whole ones before the median counts
STARTUP = 5
# how a trial ended, and its goodness after each of its epochs
End = tuple[str, Sequence[float]]


@dataclass(frozen=True)
class Pruning:
    """Whether a trial is worth finishing, which the trials before it decide.

    Attributes:
        by: Optuna's pruner.
        earlier: the trials that had ended when this one was suggested.
    """

    by: str
    earlier: Sequence[End]

    def reason(self, config: TrainConfig, rows: Sequence[dict[str, Any]]) -> str | None:
        """Why the trial should end after the epochs in `rows`, None where it should go on."""
        values = _values(config, rows)
        with _optuna() as optuna:
            study = optuna.create_study(direction="maximize", pruner=_pruner(optuna, self.by))
            for status, earlier in self.earlier:
                trial = study.ask()
                _prunes(trial, earlier)
                _tell(optuna, study, trial, (status, earlier))
            pruned = _prunes(study.ask(), values)
        if not pruned:
            return None
        measure = KINDS[config.task].measure
        held_out = measure.in_words(measure.better(values[-1]))
        return f"after epoch {len(values)} of {config.epochs}, by Optuna's {self.by} pruner: {held_out} on held-out data"


def optuna_trials(
    config: CompareConfig, candidate: Candidate
) -> list[tuple[str, TrainConfig, Pruning]]:
    """The trials that have ended, in order, and those to run next: what each is called, its run, and what may prune it.

    When all have ended there are as many as were asked for, unless one was refused or failed.
    """
    search = config.search
    made: list[tuple[str, TrainConfig, Pruning]] = []
    ends: list[End] = []
    count = trial_count(search, candidate.learned)
    mark = f"-{search.prune}"  # a trial that another pruner has ended is not this one
    with _optuna() as optuna:
        sampler = optuna.samplers.TPESampler(seed=search.seed, n_startup_trials=STARTUP)
        study = optuna.create_study(
            direction="maximize", sampler=sampler, pruner=optuna.pruners.NopPruner()
        )
        space = {
            name: optuna.distributions.FloatDistribution(min(rates), max(rates), log=True)
            for name, rates in _ranges(search, candidate.learned).items()
        }
        while len(made) < count:
            wave = [study.ask(space) for _ in range(min(search.at_once, count - len(made)))]
            known = tuple(ends)
            for trial in wave:
                # as names of folders have them
                rates = {name: float(f"{rate:.6g}") for name, rate in trial.params.items()}
                name, run = trial_config(
                    config, candidate, rates["lr"], rates.get("feedback_lr"), mark
                )
                made.append((name, run, Pruning(search.prune, known)))
                record = run_record(run)
                ends.append((record["status"], _values(run, record["epochs"])))
            for trial, end in zip(wave, ends[-len(wave) :], strict=True):
                if end[0] not in ENDED:
                    return made
                _prunes(trial, end[1])
                _tell(optuna, study, trial, end)
    return made


def trial_count(search: Search, learned: bool) -> int:
    """Trials of a rule: the same number for all, but one where there is nothing to choose."""
    if all(min(rates) == max(rates) for rates in _ranges(search, learned).values()):
        return 1
    return search.trials or len(search.lr) * len(search.feedback_lr)


def _ranges(search: Search, learned: bool) -> dict[str, list[float]]:
    return {"lr": search.lr} | ({"feedback_lr": search.feedback_lr} if learned else {})


def _values(config: TrainConfig, rows: Sequence[dict[str, Any]]) -> tuple[float, ...]:
    """The held-out goodness after each epoch; what is no number is the worst there is."""
    measure = KINDS[config.task].measure
    found = [row[f"validation_{measure.key}"] for row in rows if "sites" not in row]
    return tuple(
        measure.better(value) if value is not None and math.isfinite(value) else -math.inf
        for value in found
    )


def _pruner(optuna: ModuleType, name: str) -> Any:
    made = {
        "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=STARTUP),
        "halving": lambda: optuna.pruners.SuccessiveHalvingPruner(
            min_resource=1, reduction_factor=2
        ),
        "none": optuna.pruners.NopPruner,
    }
    return made[name]()


def _prunes(trial: Any, values: Sequence[float]) -> bool:
    """Whether the study's pruner ends a trial after its last value; it has seen the ones before."""
    pruned = False
    for epoch, value in enumerate(values, 1):
        trial.report(value, epoch)
        pruned = trial.should_prune()
    return pruned


def _tell(optuna: ModuleType, study: Any, trial: Any, end: End) -> None:
    """A trial that diverged is told as a pruned one without a value, the worst that the sampler knows."""
    status, values = end
    done = status == "done" and math.isfinite(values[-1])
    state = optuna.trial.TrialState.COMPLETE if done else optuna.trial.TrialState.PRUNED
    study.tell(trial, values[-1] if done else None, state)


@contextlib.contextmanager
def _optuna() -> Iterator[ModuleType]:
    """Optuna, which tells nobody of studies that are made to be thrown away."""
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(
            "search.by is optuna, which is not installed: pip install 'feedbackward[search]', or give --search.by grid"
        ) from error
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield optuna
    finally:
        optuna.logging.set_verbosity(level)
