"""Running a grid: what is missing of it, in one process or several, after the trials of its rates."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from feedbackward.errors import AttachError, ConfigError, DataError
from feedbackward.experiment.config.schema import Only, TrainConfig
from feedbackward.experiment.grid.candidates import (
    Candidate,
    at_best_rates,
    at_rates_of,
    rates_in_words,
    rates_of,
    run_config,
    trial_configs,
)
from feedbackward.experiment.grid.cells import ENDED, Job, find_outcome, run_record
from feedbackward.experiment.grid.layout import title
from feedbackward.experiment.grid.optuna_search import Pruning, optuna_trials, trial_count
from feedbackward.experiment.grid.plan import Comparison, Plan, in_words
from feedbackward.experiment.grid.progress_table import Key, ProgressTable
from feedbackward.experiment.grid.selection import Selection
from feedbackward.experiment.grid.survey import Facts, survey
from feedbackward.experiment.grid.workers import default_workers, run_jobs
from feedbackward.experiment.training.building import import_from_here
from feedbackward.experiment.training.environment import command_line
from feedbackward.experiment.training.interrupts import Interrupts
from feedbackward.experiment.training.refusal import refusal
from feedbackward.experiment.training.runfolder import RunFolder


@dataclass
class Runner:
    """A grid that is being run.

    Attributes:
        facts, missing: by folder, what the data set holds, or why it is missing.
        picks: by folder of the search and label, the candidate with its picked rates, or with the
            reason why it has none.
        failed: the number of failed trials of those that have no pick for that reason.
        refused: by folder and label, why a rule was refused before anything was trained.
    """

    plan: Plan
    only: Only
    workers: int
    facts: dict[str, Facts]
    missing: dict[str, str]
    picks: dict[tuple[str, str], Candidate] = field(default_factory=dict)
    failed: dict[tuple[str, str], int] = field(default_factory=dict)
    refused: dict[tuple[str, str], str] = field(default_factory=dict)

    def candidate(self, comparison: Comparison, candidate: Candidate) -> Candidate:
        """The rule with the rates that the search picked, if there was one."""
        pick = self.picks.get(self.search_of(comparison, candidate.label))
        found = candidate if pick is None else at_rates_of(pick, candidate)
        reason = self.refused.get((comparison.folder, candidate.label))
        return found if reason is None else replace(found, refused=reason)

    def follows(self, comparison: Comparison, label: str) -> str | None:
        """The rule whose picked rate of W a rule takes; None if it takes none, or its own."""
        folder, other = self.search_of(comparison, label)
        return other if (folder, other) in self.picks and other != label else None

    def search_of(self, comparison: Comparison, label: str) -> tuple[str, str]:
        """Folder and label of the trials that pick a rule's rates: its own, or the baseline's."""
        if comparison.search_on is None:
            return "", ""
        on = self.plan.comparisons[comparison.search_on]
        shared = on.config.search.baseline_only
        return comparison.search_on, on.candidates[0].label if shared else label

    def job(self, folder: str, config: TrainConfig, label: str, what: str) -> Job:
        """A cell of a comparison as a job."""
        block = next(block for block in self.plan.blocks if block.folder == folder)
        group = (config.model, config.data.name, folder)
        images = self.facts[folder].train * (config.epochs or 1)
        name = ", ".join(filter(None, (title(self.plan, block), what)))
        return Job(name, config, group, label, images)

    def jobs(self, rated: bool = True) -> list[tuple[Key, Job]]:
        """The cells to run that have data and rates; with `rated` false, also those without rates yet."""
        made = []
        for folder, candidate, seed in Selection(self.plan, self.only).cells():
            comparison = self.plan.comparisons[folder]
            search = self.search_of(comparison, candidate.label)
            waits = comparison.search_on is not None and search not in self.picks
            candidate = self.candidate(comparison, candidate)
            if folder in self.missing or (rated and waits) or candidate.refused is not None:
                continue
            config = run_config(comparison.config, candidate, seed)
            job = self.job(folder, config, candidate.label, f"{candidate.label}, seed {seed}")
            made.append(((folder, candidate.label, seed), job))
        return made

    def trials(self, everything: bool = False) -> dict[tuple[str, str], list[Job]]:
        """By folder of the search and label, the trials that the cells to run (or all cells) need."""
        needed: dict[tuple[str, str], list[Job]] = {}
        for folder, candidate, _ in Selection(
            self.plan, Only() if everything else self.only
        ).cells():
            comparison = self.plan.comparisons[folder]
            on, label = self.search_of(comparison, candidate.label)
            if comparison.search_on is None or (on, label) in needed:
                continue
            if {on, folder} & {*self.missing} or (on, label) in self.refused:
                continue
            if self.plan.comparisons[on].candidate(label):
                needed[on, label] = self._trials_of(on, label)
        return needed

    def _trials_of(self, folder: str, label: str) -> list[Job]:
        """The trials of a rule; of those that Optuna suggests, the ones that are known by now."""
        comparison = self.plan.comparisons[folder]
        candidate = comparison.candidate(label)
        assert candidate is not None
        found: list[tuple[str, TrainConfig, Pruning | None]]
        if comparison.config.search.by == "optuna":
            found = [*optuna_trials(comparison.config, candidate)]
        else:
            found = [(*trial, None) for trial in trial_configs(comparison.config, candidate)]
        jobs = []
        for name, run, pruning in found:
            job = self.job(folder, run, label, f"trial of {name}")
            jobs.append(replace(job, test=False, pruning=pruning))
        return jobs

    def choose(
        self, trials: Mapping[tuple[str, str], Sequence[Job]], say: Callable[[str], None]
    ) -> None:
        """Pick the rates from the finished trials, on held-out images.

        A rule gets no pick while a trial is missing or has failed.
        """
        for (folder, label), jobs in trials.items():
            candidate = self.plan.comparisons[folder].candidate(label)
            assert candidate is not None
            ends = [end for job in jobs if (end := find_outcome(job)) is not None]
            if len(ends) < len(jobs):
                continue
            self.failed[folder, label] = sum(end.status == "failed" for end in ends)
            if self.failed[folder, label]:
                continue
            refused = [end.message for end in ends if end.status == "refused"]
            if refused:
                self.picks[folder, label] = replace(candidate, refused=refused[0])
                continue
            found = at_best_rates(candidate, [_trial(job, candidate.learned) for job in jobs])
            rates = rates_in_words(found.entry.lr or 0, found.entry.feedback_lr)
            pruned = sum(end.status == "pruned" for end in ends)
            of = f"{len(jobs)} trials" + (f", {pruned} of them pruned" if pruned else "")
            text = found.refused or f"{label}: picked {rates} of {of}"
            say(f"{folder}, {text}" if folder else text)
            self.picks[folder, label] = found

    def clear(self) -> None:
        """Remove the cells to run, and the trials of those rules; another rule's trials stay."""
        cells, trials = self.jobs(rated=False), self.trials()
        labels = {label for (_, label, _), _ in cells}
        gone = [key for key in trials if key[1] in labels]
        for job in [*(job for key in gone for job in trials[key]), *(job for _, job in cells)]:
            if job.folder.config_file.is_file():
                job.folder.clear()
        for key in gone:
            self.picks.pop(key, None)

    def run(self, console: Console, interrupts: Interrupts) -> None:
        """Run what is missing: the trials of rates, then the cells.

        Raises:
            InterruptedRunError: a signal came; the running cells are saved.
            ConfigError: a cell was begun with another config. Any other problem of a cell is a result.
            AttachError: every rule of a single comparison is refused.
        """
        if self.plan.single:
            self._admit(console, interrupts)
        trials = self.trials()
        for folder, reason in self._missing_data().items():
            text = f"no data for {folder}: {reason}"
            console.print(text, highlight=False, markup=False, soft_wrap=True)
        for job in [job for _, job in self.jobs()] if not trials else []:
            job.folder.check_free(job.config)
        shown = ProgressTable(self.plan, console, self.workers, self.missing)
        for key, job in self.jobs(rated=False):
            shown.add(key, job, find_outcome(job))
        with shown:
            self._search(trials, shown, interrupts)
            self.choose(trials, shown.say)
            cells = self.jobs()
            self._report_unrated({key[:2] for key, _ in cells}, shown.say)
            for key, job in cells:
                job.folder.check_free(job.config)
                shown.add(key, job, find_outcome(job))
            self._run_all(cells, shown, interrupts)

    def _search(
        self, trials: dict[tuple[str, str], list[Job]], shown: ProgressTable, interrupts: Interrupts
    ) -> None:
        """Run the trials, and add to them those that Optuna suggests when it knows how the ones before ended."""

        def begun(row: tuple[str, str], first: int) -> list[tuple[Key, Job]]:
            made = [((row[0], f"{row[1]} trial", n), job) for n, job in enumerate(trials[row])]
            for key, job in made[first:]:
                job.folder.check_free(job.config)
                shown.add(key, job, find_outcome(job))
            return made[first:]

        def follow(key: Key) -> list[tuple[Key, Job]]:
            row = key[0], key[1].removesuffix(" trial")
            before, trials[row] = len(trials[row]), self._trials_of(*row)
            return begun(row, before)

        cells = []
        for row, jobs in trials.items():
            for n in range(len(jobs), self._trial_count(*row)):
                # not known yet: it takes about as long as the last one that is
                shown.add((row[0], f"{row[1]} trial", n), jobs[-1], None)
            cells += begun(row, 0)
        self._run_all(cells, shown, interrupts, follow)

    def _trial_count(self, folder: str, label: str) -> int:
        """How many trials Optuna is to suggest for a rule."""
        comparison = self.plan.comparisons[folder]
        candidate, search = comparison.candidate(label), comparison.config.search
        assert candidate is not None
        return trial_count(search, candidate.learned) if search.by == "optuna" else 0

    def _admit(self, console: Console, interrupts: Interrupts) -> None:
        """Find the rules that are refused before time is spent on the others.

        In a grid of several comparisons the first cell of each rule shows as much.
        """
        comparison = self.plan.comparisons[""]
        for candidate in comparison.candidates:
            interrupts.check()
            config = comparison.config
            jobs = [self.job("", run_config(config, candidate, s), "", "") for s in config.seeds]
            if any(job.folder.checkpoint.exists() or job.folder.result() for job in jobs):
                continue
            reason = refusal(run_config(config, candidate, config.seeds[0]))
            if reason is not None:
                self.refused["", candidate.label] = reason
                if comparison.search_on is not None:
                    # the rules that would take its rate have none
                    self.picks["", candidate.label] = replace(candidate, refused=reason)
                text = f"{candidate.label} is refused: {reason}"
                console.print(text, highlight=False, markup=False, soft_wrap=True)
        self.check_some_run()

    def check_some_run(self) -> None:
        """Raise AttachError if every rule of a single comparison is refused."""
        if not self.plan.single:
            return
        comparison = self.plan.comparisons[""]
        found = [self.candidate(comparison, c) for c in comparison.candidates]
        if all(candidate.refused for candidate in found):
            raise AttachError(f"every rule is refused; {found[0].label}: {found[0].refused}")

    def _report_unrated(self, rated: set[Any], say: Callable[[str], None]) -> None:
        """Say which rules are not run because they have no rates; refuse if none has any."""
        self.check_some_run()
        for folder, label in dict.fromkeys(key[:2] for key, _ in self.jobs(rated=False)):
            if (folder, label) not in rated:
                where = ", ".join(filter(None, (folder, label)))
                say(f"{where}: not run, because its search of rates did not come to an end")

    def _run_all(
        self,
        cells: Sequence[tuple[Key, Job]],
        shown: ProgressTable,
        interrupts: Interrupts,
        follow: Callable[[Key], list[tuple[Key, Job]]] = lambda key: [],
    ) -> None:
        """Run the cells that have not ended, and those that follow from the end of one."""
        rest = [c for c in cells if shown.states[c[0]].status not in ENDED]
        jobs = [job for _, job in rest]

        def report(number: int, kind: str, value: Any) -> None:
            shown.report(rest[number][0] if number >= 0 else None, kind, value)
            if kind == "end" and value.status in ENDED:
                new = follow(rest[number][0])
                rest.extend(new)
                jobs.extend(job for _, job in new)

        run_jobs(jobs, self.workers, report, interrupts, self.plan.options.executor)

    def _missing_data(self) -> dict[str, str]:
        """Why data sets are missing, each once."""
        comparisons = self.plan.comparisons
        return {
            in_words("data.name", comparisons[folder].config.data.name): reason
            for folder, reason in self.missing.items()
        }


def _trial(job: Job, learned: bool) -> dict[str, Any]:
    """A finished trial as the search reads it."""
    run = run_record(job.config)
    return {
        **rates_of(job.config, learned),
        "status": run["status"],
        **{key: run[key] for key in run if key == "measure" or key.startswith("validation_")},
    }


@contextlib.contextmanager
def opened(
    plan: Plan, only: Only, workers: int | None, interrupts: Interrupts, overwrite: bool = False
) -> Iterator[Runner]:
    """The grid's folder, locked for other processes. Data sets that are new here are decoded.

    Raises:
        ConfigError: the folder cannot be used, or `only` names what the grid does not have.
        DataError: a single comparison has no data.
    """
    import_from_here()
    Selection(plan, only)
    lock = _claim(plan)
    try:
        plan, facts, missing = survey(plan, interrupts)
        if plan.single and missing:
            raise DataError(missing[""])
        count = workers or default_workers(plan)
        runner = Runner(plan, only, count, facts, missing)
        if overwrite:
            runner.clear()
        runner.choose(runner.trials(everything=True), lambda text: None)
        yield runner
    finally:
        lock.close()


def _claim(plan: Plan) -> RunFolder:
    """The folder of the results, locked, with the config in it."""
    folder = RunFolder(Path(plan.options.out))
    try:
        # study.yaml: of a grid of 0.1.0
        known = any((folder.path / name).is_file() for name in ("config.yaml", "study.yaml"))
        if folder.path.exists() and any(folder.path.iterdir()) and not known:
            raise ConfigError(
                f"{folder.path} is not the folder of a comparison: choose another with --out, or empty it"
            )
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.lock()
        folder.write(folder.config_file, plan.grid.text)
        with (folder.path / "compare.log").open("a", encoding="utf-8") as log:
            log.write(f"# {command_line()}\n")
    except OSError as error:
        raise ConfigError(
            f"the folder {folder.path} cannot be written ({error.strerror}): choose one with --out"
        ) from error
    return folder
