"""Running a study: what is missing of it, in processes side by side, and its tables at the end."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from feedbackward.errors import ConfigError
from feedbackward.experiment.config.schema import TrainConfig
from feedbackward.experiment.config.suggest import hint
from feedbackward.experiment.grid.board import Board, Key
from feedbackward.experiment.grid.cells import Job, found
from feedbackward.experiment.grid.compare import (
    Cell,
    Contender,
    at_rates_of,
    cell_config,
    picked,
    trial_cells,
)
from feedbackward.experiment.grid.definition import Study
from feedbackward.experiment.grid.grid import Block, Comparison, Options, Plan, expand, in_words
from feedbackward.experiment.grid.layout import title
from feedbackward.experiment.grid.survey import Facts, survey
from feedbackward.experiment.grid.workers import run_jobs, sensible_workers
from feedbackward.experiment.training.building import import_from_here
from feedbackward.experiment.training.interrupts import Interrupts
from feedbackward.experiment.training.runfolder import RunFolder


@dataclass(frozen=True)
class Filters:
    """Which part of a study to run: names of models, data sets, rules (or labels), sections, and seeds; None is all."""

    models: Sequence[str] | None = None
    data: Sequence[str] | None = None
    rules: Sequence[str] | None = None
    sections: Sequence[str] | None = None
    seeds: Sequence[int] | None = None

    def check(self, plan: Plan) -> None:
        """Raise ConfigError for what the study does not have."""
        configs = [comparison.config for comparison in plan.comparisons.values()]
        contenders = [c for comparison in plan.comparisons.values() for c in comparison.contenders]
        known: dict[str, set[Any]] = {
            "models": {config.model for config in configs},
            "data": {in_words("data.name", config.data.name) for config in configs},
            "rules": {name for c in contenders for name in (c.entry.rule, c.label)},
            "sections": {block.section for block in plan.blocks},
            "seeds": {seed for config in configs for seed in config.seeds},
        }
        for what, names in known.items():
            for name in getattr(self, what) or ():
                if name not in names:
                    near = hint(str(name), sorted(map(str, names)))
                    raise ConfigError(f"the study has no {what.rstrip('s')} '{name}': {near}")

    def blocks(self, plan: Plan) -> Iterator[Block]:
        """Those with something to run."""
        for block in plan.blocks:
            config = plan.of(block).config
            wanted = (
                (self.sections, block.section),
                (self.models, config.model),
                (self.data, in_words("data.name", config.data.name)),
            )
            if all(names is None or name in names for names, name in wanted):
                yield block

    def cells(self, plan: Plan) -> Iterator[tuple[str, Contender, int]]:
        """Folder, rule and seed of every cell to run, the first seed of all before the second of any."""
        chosen: dict[Key, tuple[str, Contender, int]] = {}
        for block in self.blocks(plan):
            for contender in plan.of(block).contenders:
                named = self.rules is None or {contender.label, contender.entry.rule} & {
                    *self.rules
                }
                for place, seed in enumerate(
                    block.seeds if named and contender.label in block.labels else ()
                ):
                    if self.seeds is None or seed in self.seeds:
                        chosen.setdefault(
                            (block.folder, contender.label, place), (block.folder, contender, seed)
                        )
        order = sorted(chosen, key=lambda key: key[2])  # stable
        yield from (chosen[key] for key in order)


@dataclass
class Running:
    """A study that is being run.

    `picks`: by folder of the search and label, the contender with its picked rates, or with why it has none.
    `failed`: the number of failed trials of those that have no pick therefore.
    """

    plan: Plan
    filters: Filters
    workers: int
    facts: dict[str, Facts]
    missing: dict[str, str]
    picks: dict[tuple[str, str], Contender] = field(default_factory=dict)
    failed: dict[tuple[str, str], int] = field(default_factory=dict)

    def contender(self, comparison: Comparison, contender: Contender) -> Contender:
        """The rule with the rates that the search picked, if there was one."""
        pick = self.picks.get(self.search_of(comparison, contender.label))
        return contender if pick is None else at_rates_of(pick, contender)

    def follows(self, comparison: Comparison, label: str) -> str | None:
        """The rule whose picked rate of W a rule takes; None where it takes none, or its own."""
        folder, other = self.search_of(comparison, label)
        return other if (folder, other) in self.picks and other != label else None

    def search_of(self, comparison: Comparison, label: str) -> tuple[str, str]:
        """The folder and the label of the trials that pick a rule's rates: the rule's own, or the baseline's."""
        on = comparison.search_on or ""
        shared = on and self.plan.comparisons[on].config.search.baseline_only
        return on, self.plan.comparisons[on].contenders[0].label if shared else label

    def job(
        self, folder: str, config: TrainConfig, label: str, what: str, test: bool = True
    ) -> Job:
        """A cell of a comparison as a job."""
        block = next(block for block in self.plan.blocks if block.folder == folder)
        group = (config.model, config.data.name, folder)
        images = self.facts[folder].train * (config.epochs or 1)
        return Job(f"{title(self.plan, block)}, {what}", config, group, label, images, test)

    def jobs(self, rated: bool = True) -> list[tuple[Key, Job]]:
        """The cells to run whose data is here and whose rule has rates; or will have, if not `rated`."""
        made = []
        for folder, contender, seed in self.filters.cells(self.plan):
            if folder in self.missing:
                continue
            comparison = self.plan.comparisons[folder]
            if (
                rated
                and comparison.search_on
                and self.search_of(comparison, contender.label) not in self.picks
            ):
                continue
            contender = self.contender(comparison, contender)
            if contender.refused is None:
                config = cell_config(comparison.config, contender, seed)
                job = self.job(folder, config, contender.label, f"{contender.label}, seed {seed}")
                made.append(((folder, contender.label, seed), job))
        return made

    def trials(self, everything: bool = False) -> dict[tuple[str, str], list[Job]]:
        """By folder of the search and label, the trials that the cells to run need (or all cells of the study)."""
        needed: dict[tuple[str, str], list[Job]] = {}
        filters = Filters() if everything else self.filters
        for folder, contender, _ in filters.cells(self.plan):
            on, label = self.search_of(self.plan.comparisons[folder], contender.label)
            if not on or on in self.missing or (on, label) in needed or folder in self.missing:
                continue
            there = {c.label: c for c in self.plan.comparisons[on].contenders}
            if label in there:
                cells = trial_cells(self.plan.comparisons[on].config, there[label])
                needed[on, label] = [
                    self.job(on, cell.config, label, f"trial of {cell.title}", test=False)
                    for cell in cells
                ]
        return needed

    def choose(
        self, trials: Mapping[tuple[str, str], Sequence[Job]], say: Callable[[str], None]
    ) -> None:
        """Pick the rates from the finished trials, on held-out images; a rule without all of them has none yet."""
        for (folder, label), jobs in trials.items():
            contender = next(
                c for c in self.plan.comparisons[folder].contenders if c.label == label
            )
            ends = [found(job) for job in jobs]
            if any(end is None for end in ends):
                continue
            self.failed[folder, label] = sum(
                end is not None and end.status == "failed" for end in ends
            )
            if self.failed[folder, label]:
                continue
            refused = [end.message for end in ends if end is not None and end.status == "refused"]
            if refused:
                self.picks[folder, label] = replace(contender, refused=refused[0])
                continue
            cells = [Cell(job.title, job.config) for job in jobs]
            self.picks[folder, label] = picked(contender, cells, say, f"{folder}, ")


@contextlib.contextmanager
def opened(
    study: Study, options: Options, filters: Filters, workers: int | None, interrupts: Interrupts
) -> Iterator[Running]:
    """The study as its folder has it, kept from other processes meanwhile. Decodes data sets that are new here.

    Raises FeedbackError: the study, the folder or a filter is wrong.
    """
    import_from_here()
    plan = expand(study, options)
    filters.check(plan)
    lock = _claim(plan)
    try:
        plan, facts, missing = survey(plan, interrupts.check)
        device = next(iter(plan.comparisons.values())).config.device
        running = Running(plan, filters, workers or sensible_workers(device), facts, missing)
        running.choose(running.trials(everything=True), lambda text: None)
        yield running
    finally:
        lock.close()


def run(running: Running, console: Console, interrupts: Interrupts) -> None:
    """Run what is missing: the trials of rates, then the cells.

    Raises:
        InterruptedRunError: a signal came; the running cells are saved.
        ConfigError: a cell was begun with another config. What ails a cell otherwise is a result.
    """
    plan, trials = running.plan, running.trials()
    for folder, reason in _per_data(running).items():
        console.print(
            f"no data for {folder}: {reason}", highlight=False, markup=False, soft_wrap=True
        )
    for jobs in (*trials.values(), [job for _, job in running.jobs()] if not trials else []):
        for job in jobs:
            job.folder.check_free(job.config)
    board = Board(plan, console, running.workers, running.missing)
    flat = [
        ((folder, f"{label} trial", n), job)
        for (folder, label), row in trials.items()
        for n, job in enumerate(row)
    ]
    for key, job in [*flat, *running.jobs(rated=False)]:
        board.add(key, job, found(job))
    with board:
        _run_all(flat, board, running.workers, interrupts)
        running.choose(trials, board.say)
        cells = running.jobs()
        for folder, label in dict.fromkeys(key[:2] for key, _ in running.jobs(rated=False)):
            if not any(key[:2] == (folder, label) for key, _ in cells):
                board.say(
                    f"{folder}, {label}: not run, for its search of rates did not come to an end"
                )
        for key, job in cells:
            job.folder.check_free(job.config)
            board.add(key, job, found(job))
        _run_all(cells, board, running.workers, interrupts)


def _run_all(
    cells: Sequence[tuple[Key, Job]], board: Board, workers: int, interrupts: Interrupts
) -> None:
    """Run the cells that are not at their end."""
    left = [
        (key, job) for key, job in cells if board.states[key].status not in ("done", "diverged")
    ]
    keys = [key for key, _ in left]

    def told(number: int, kind: str, value: Any) -> None:
        board.told(keys[number] if number >= 0 else None, kind, value)

    run_jobs([job for _, job in left], workers, told, interrupts)


def _per_data(running: Running) -> dict[str, str]:
    """Why data sets are missing, each once."""
    configs = {
        folder: running.plan.comparisons[folder].config.data.name for folder in running.missing
    }
    return {
        in_words("data.name", configs[folder]): reason for folder, reason in running.missing.items()
    }


def _claim(plan: Plan) -> RunFolder:
    """The study's folder, locked, with the study and every comparison's config in it."""
    folder = RunFolder(Path(plan.options.out))
    file = folder.path / "study.yaml"
    try:
        if folder.path.exists() and any(folder.path.iterdir()) and not file.is_file():
            raise ConfigError(
                f"{folder.path} is not the folder of a study: choose another with --out, or empty it"
            )
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.lock()
        folder.write(file, plan.study.text)
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
        with (folder.path / "study.log").open("a", encoding="utf-8") as log:
            log.write(f"# {command}\n")
    except OSError as error:
        raise ConfigError(
            f"the folder {folder.path} cannot be written ({error.strerror}): choose one with --out"
        ) from error
    return folder


def clear(running: Running) -> None:
    """Remove the cells to run, and the trials of those rules; a rule that takes another's rate leaves its trials."""
    cells, trials = running.jobs(rated=False), running.trials()
    labels = {label for (_, label, _), _ in cells}
    gone = [key for key in trials if key[1] in labels]
    for job in [*(job for key in gone for job in trials[key]), *(job for _, job in cells)]:
        if job.folder.config_file.is_file():
            job.folder.clear()
    for key in gone:
        running.picks.pop(key, None)
