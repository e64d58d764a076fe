"""Several rules over several seeds under one recipe: run what is missing, measure costs, gather results."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from feedbackward.errors import AttachError, ConfigError, DivergenceError
from feedbackward.experiment.benchmark.step_costs import Costs, measure_costs
from feedbackward.experiment.config.files import to_dict, write_yaml
from feedbackward.experiment.config.schema import (
    CONDITIONS,
    CompareConfig,
    RuleEntry,
    TrainConfig,
    slug,
)
from feedbackward.experiment.grid.search import pick, trial_rates
from feedbackward.experiment.training.building import (
    find_device,
    import_from_here,
    make_rule,
    shared_data,
)
from feedbackward.experiment.training.environment import environment
from feedbackward.experiment.training.interrupts import Interrupts
from feedbackward.experiment.training.progress import Progress
from feedbackward.experiment.training.refusal import refusal
from feedbackward.experiment.training.runfolder import RunFolder
from feedbackward.experiment.training.train import train

BASELINE = "bp"  # comes first, and times and memory are relative to it


@dataclass(frozen=True)
class Contender:
    """A rule of the comparison, under its label, and the trials by which its rates were picked.

    learned: whether it learns feedback, which has a rate of its own then. refused: why it cannot be run here.
    """

    entry: RuleEntry
    label: str
    learned: bool
    trials: list[dict[str, Any]] = field(default_factory=list)
    refused: str | None = None


@dataclass(frozen=True)
class Cell:
    """One training run of the comparison and what to call it."""

    title: str
    config: TrainConfig

    @property
    def folder(self) -> RunFolder:
        """Where it lives."""
        return RunFolder(Path(self.config.out or ""))


def compare(config: CompareConfig, console: Console, interrupts: Interrupts) -> dict[str, Any]:
    """Run what has not been run yet, and return the results of all (as in results.json).

    A run that is finished is skipped and an interrupted one is resumed. Rates are picked on held-out images
    only; the test images are used once per finished run. A rule that the net refuses is told with its reason.

    Raises:
        InterruptedRunError: a signal came; the running cell is saved.
        FeedbackError: the config, the data or the folder is not usable. Divergence of a cell is a result.
    """
    config = config.resolved()
    import_from_here()
    folder = _claim(config)
    contenders = _admit(config, find_contenders(config), console, interrupts)
    if config.search.run:
        contenders = _search(config, contenders, console, interrupts)
    running = _running(contenders)
    cells = [
        Cell(f"{c.label}, seed {seed}", cell_config(config, c, seed))
        for seed in config.seeds
        for c in running
    ]
    _run_all(cells, Progress(console, log=folder / "compare.log"), interrupts)
    console.print("measuring time and memory per step ...", highlight=False)
    first = [cell_config(config, contender, config.seeds[0]) for contender in running]
    costs = measure_costs(first, config.timing_steps, interrupts.check)
    return _results(config, contenders, costs)


def _claim(config: CompareConfig) -> Path:
    """The comparison's folder, holding its config. The cells look after themselves."""
    assert config.out is not None  # a resolved config has one
    folder = Path(config.out)
    file = folder / "config.yaml"
    try:
        if folder.exists() and any(folder.iterdir()) and not file.is_file():
            raise ConfigError(
                f"{folder} is not the folder of a comparison: choose another with --out, or empty it"
            )
        folder.mkdir(parents=True, exist_ok=True)
        if (
            config.overwrite
        ):  # all cells at once, so that going on after an interruption replaces the rest too
            for cell in (*folder.glob("*/config.yaml"), *folder.glob("search/*/config.yaml")):
                RunFolder(cell.parent).clear()
        RunFolder(folder).write(file, write_yaml(config))
    except OSError as error:
        raise ConfigError(
            f"the folder {folder} cannot be written ({error.strerror}): choose one with --out"
        ) from error
    return folder


def find_contenders(config: CompareConfig) -> list[Contender]:
    """The rules in order, the baseline first, each with its own label."""
    made = []
    for entry in sorted(config.entries(), key=lambda entry: entry.rule != BASELINE):
        rule = make_rule(
            entry.rule, entry.options
        )  # refuses wrong options before anything is trained
        told = {**entry.options, **entry.conditions()}
        options = ", ".join(f"{key}={value}" for key, value in told.items())
        label = entry.label or rule.label + (f" ({options})" if options else "")
        made.append(Contender(entry, label, rule.learned))
    names = [slug(contender.label) for contender in made]
    for name, contender in zip(names, made, strict=True):
        if names.count(name) > 1:
            raise ConfigError(
                f"two rules have the label '{contender.label}': give each its own label"
            )
    return made


def _admit(
    config: CompareConfig, contenders: Sequence[Contender], console: Console, interrupts: Interrupts
) -> list[Contender]:
    """The contenders, those that the net, the sites or the schedule refuse with the reason."""
    admitted = []
    for contender in contenders:
        interrupts.check()
        reason = refusal(cell_config(config, contender, config.seeds[0]))
        if reason is not None:
            console.print(f"{contender.label} is refused: {reason}", highlight=False, markup=False)
        admitted.append(replace(contender, refused=reason))
    _running(admitted)
    return admitted


def _running(contenders: Sequence[Contender]) -> list[Contender]:
    """Those that are not refused. Raises AttachError where there is none."""
    running = [contender for contender in contenders if contender.refused is None]
    if not running:
        raise AttachError(f"every rule is refused; {contenders[0].label}: {contenders[0].refused}")
    return running


def cell_config(config: CompareConfig, contender: Contender, seed: int) -> TrainConfig:
    """The run of one rule and seed, to be resumed where it exists."""
    out = f"{config.out}/{slug(contender.label)}-s{seed}"
    return replace(
        config.cell(contender.entry, seed), out=out, overwrite=False, resume=True
    ).resolved()


def _run_all(
    cells: Sequence[Cell], progress: Progress, interrupts: Interrupts, test: bool = True
) -> None:
    """Train every cell that is not finished, telling how it goes."""
    progress.runs = sum(cell.folder.result() is None for cell in cells)
    with progress:
        for number, cell in enumerate(cells, 1):
            interrupts.check()
            progress.prefix = f"[{number}/{len(cells)}] {cell.title}: "
            try:
                result = train(cell.config, progress, interrupts, test=test)
            except DivergenceError as error:
                progress.say(f"diverged: {error}")
                continue
            accuracy = f", test {result['test_accuracy']:.2f} %" if test else ""
            progress.say(f"finished in {result['seconds']:.0f} s{accuracy}")


def _search(
    config: CompareConfig, contenders: Sequence[Contender], console: Console, interrupts: Interrupts
) -> list[Contender]:
    """The contenders with the rates that do best on held-out images: by equal trials for each, or the first's for all."""
    first, running = contenders[0], _running(contenders)
    if config.search.baseline_only:
        if first.refused:
            raise AttachError(
                f"{first.label} is to be searched for the rate of all, but refused: {first.refused}"
            )
        running = [first]
    cells = {c.label: trial_cells(config, c) for c in running}
    progress = Progress(console, log=Path(config.out or "") / "compare.log")
    _run_all([cell for row in cells.values() for cell in row], progress, interrupts, test=False)
    picks = {}
    progress.prefix = ""
    for contender in running:
        picks[contender.label] = picked(contender, cells[contender.label], progress.say)
    shared = first.label if config.search.baseline_only else None
    return [c if c.refused else at_rates_of(picks[shared or c.label], c) for c in contenders]


def picked(
    contender: Contender, cells: Sequence[Cell], say: Callable[[str], None], where: str = ""
) -> Contender:
    """The contender at the rates of its best trial, which it says; refused where every trial diverged."""
    trials = [trial_result(cell, contender.learned) for cell in cells]
    try:
        lr, feedback_lr = pick(trials, contender.label)
    except DivergenceError as error:  # one rule must not stop the others
        say(str(error))
        return replace(contender, trials=trials, refused=str(error))
    say(
        f"{where}{contender.label}: picked {rates_in_words(lr, feedback_lr)} of {len(trials)} trials"
    )
    entry = replace(contender.entry, lr=lr, feedback_lr=feedback_lr)
    return replace(contender, entry=entry, trials=trials)


def at_rates_of(found: Contender, contender: Contender) -> Contender:
    """The contender at the rates that a search found for it; or at W's rate, where the search was another rule's."""
    if found.label != contender.label:
        if found.refused:
            return replace(
                contender, refused=f"no rate was found for it, {found.label}: {found.refused}"
            )
        return replace(contender, entry=replace(contender.entry, lr=found.entry.lr))
    if found.refused:
        return replace(contender, trials=found.trials, refused=found.refused)
    entry = replace(contender.entry, lr=found.entry.lr, feedback_lr=found.entry.feedback_lr)
    return replace(contender, entry=entry, trials=found.trials)


def trial_cells(config: CompareConfig, contender: Contender) -> list[Cell]:
    """The trials of a rule's rates."""
    cells = []
    for lr, feedback_lr in trial_rates(config.search, contender.learned):
        rates = "-".join(f"{rate:.6g}" for rate in (lr, feedback_lr) if rate is not None)
        entry = replace(contender.entry, lr=lr, feedback_lr=feedback_lr)
        trial = replace(
            config.cell(entry, config.search.seed),
            out=f"{config.out}/search/{slug(contender.label)}-{rates}",
            overwrite=False,
            resume=True,
            epochs=config.search.epochs,
            probe_every=0,
            tensorboard=False,
        ).resolved()
        cells.append(Cell(f"{contender.label}, {rates_in_words(lr, feedback_lr)}", trial))
    return cells


def rates_in_words(lr: float, feedback_lr: float | None) -> str:
    """The rates of W and, where it is learned, of B."""
    return f"lr {lr:.3g}" + ("" if feedback_lr is None else f", feedback lr {feedback_lr:.3g}")


def trial_result(cell: Cell, learned: bool) -> dict[str, Any]:
    """A finished trial as `pick` reads it."""
    run = finished_run(cell)
    return {
        **rates_of(cell.config, learned),
        "status": run["status"],
        "validation_accuracy": run["validation_accuracy"],
    }


def rates_of(config: TrainConfig, learned: bool) -> dict[str, float | None]:
    """A run's rates of W and of B."""
    return {"lr": config.forward.lr, "feedback_lr": config.feedback.lr if learned else None}


def finished_run(cell: Cell) -> dict[str, Any]:
    """A finished cell as the results hold it."""
    rows, result = cell.folder.rows(), cell.folder.result() or {}
    epochs = [row for row in rows if row.pop("kind") == "epoch"]
    diverged = result["status"] != "done"
    return {
        "seed": cell.config.seed,
        "status": result["status"],
        "message": result["message"],
        "test_accuracy": result["test_accuracy"],
        "validation_accuracy": None
        if diverged or not epochs
        else epochs[-1]["validation_accuracy"],
        "seconds": result["seconds"],
        "epochs": epochs,
        "alignment": [row for row in rows if "sites" in row],
    }


def _refused(contender: Contender) -> dict[str, Any]:
    """A rule that could not be run, as the results hold it."""
    entry = contender.entry
    shared = {"rule": entry.rule, "label": contender.label, "options": entry.options}
    return {**shared, "refused": contender.refused, "search": contender.trials, "runs": []}


def described(contender: Contender, config: TrainConfig) -> dict[str, Any]:
    """What results say of a rule before it runs; `config` is that of one of its runs."""
    entry = contender.entry
    return {
        "rule": entry.rule,
        "label": contender.label,
        "options": entry.options,
        **{name: getattr(config, name) for name in CONDITIONS},
        "rates": rates_of(config, contender.learned),
        "search": contender.trials,
    }


def _rule(
    config: CompareConfig, contender: Contender, cost: Costs, baseline: Costs | None
) -> dict[str, Any]:
    """A rule with its costs and runs, as the results hold it."""
    cells = [cell_config(config, contender, seed) for seed in config.seeds]
    return {
        **described(contender, cells[0]),
        **cost.as_dict(baseline),
        "runs": [finished_run(Cell("", cell)) for cell in cells],
    }


def _results(
    config: CompareConfig, contenders: Sequence[Contender], costs: Sequence[Costs]
) -> dict[str, Any]:
    """Everything the report needs, and nothing it has to look up."""
    data = shared_data(config.data)
    baseline = costs[0] if _running(contenders)[0].entry.rule == BASELINE else None
    found = iter(costs)
    rules = [
        _refused(contender)
        if contender.refused is not None
        else _rule(config, contender, next(found), baseline)
        for contender in contenders
    ]
    return {
        "version": 1,
        "title": config.title or f"{config.model} on {data.name}",
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(find_device(config.device)),
        "config": to_dict(config),
        "data": {
            "name": data.name,
            "train": len(data.train),
            "validation": len(data.validation),
            "test": len(data.test),
            "classes": data.num_classes,
            "note": data.note,
        },
        "model": {"name": config.model, "parameters": costs[0].parameters},
        "sites": list(costs[0].sites),
        "rules": rules,
    }
