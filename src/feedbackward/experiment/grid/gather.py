"""All that the report of a grid shows, gathered from its folder into one JSON document."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from feedbackward.experiment.config.files import flat, to_dict
from feedbackward.experiment.config.schema import CONDITIONS, TrainConfig
from feedbackward.experiment.grid.candidates import Candidate, rates_of, run_config
from feedbackward.experiment.grid.cells import run_record
from feedbackward.experiment.grid.costs import costs_of
from feedbackward.experiment.grid.layout import Table, column_name, tables, title
from feedbackward.experiment.grid.plan import Block, Comparison
from feedbackward.experiment.grid.runner import Runner
from feedbackward.experiment.report.summary import VERSION, clean
from feedbackward.experiment.training.building import find_device
from feedbackward.experiment.training.environment import command_line, environment
from feedbackward.experiment.training.runfolder import RunFolder

Results = dict[str, Any]
# of each site, of all that a probe gives
MEASURES = ("angle", "norm_ratio", "bp_norm", "jacobian_cosine")


def gather(runner: Runner) -> Results:
    """The results of the whole grid, also of what this command did not run.

    A single comparison is one block with these facts beside it: the same document as in 0.1.0.
    """
    plan, grid = runner.plan, runner.plan.grid
    facts = {
        "version": VERSION,
        "title": grid.title,
        "command": command_line(),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "environment": {**environment(find_device(plan.device)), "workers": runner.workers},
        "scale": plan.options.scale,
    }
    if plan.single:
        return _block(runner, plan.blocks[0]) | facts
    sections = [
        {
            "name": section.name,
            "title": section.title,
            "about": section.about,
            "tables": [_table(runner, t) for t in tables(plan) if t.section == section.name],
        }
        for section in grid.sections
    ]
    return {
        **facts,
        "study": grid.name,
        "about": grid.about,
        "sets": flat(plan.options.changes),
        "sections": sections,
        "config": grid.text,
    }


def _table(runner: Runner, table: Table) -> Results:
    blocks = [_block(runner, block) for block in table.blocks]
    return {"title": table.title, "labels": table.labels, "blocks": blocks}


def _block(runner: Runner, block: Block) -> Results:
    """One comparison: its data, its net, and its rules with their costs and runs."""
    comparison = runner.plan.of(block)
    config, facts = comparison.config, runner.facts.get(block.folder)
    ours = [c for c in comparison.candidates if c.label in block.labels]
    rules = [_rule(runner, comparison, block, runner.candidate(comparison, c)) for c in ours]
    costs = costs_of(runner, comparison)
    rules = [rule | costs[rule["label"]] for rule in rules]
    runs = [run for rule in rules for run in rule["runs"]]
    sites = {site: None for run in runs for probe in run["alignment"] for site in probe["sites"]}
    return clean(
        {
            "version": VERSION,
            "title": title(runner.plan, block),
            "column": column_name(runner.plan, block),
            "folder": block.folder,
            "point": block.point,
            "epochs": run_config(config, ours[0], block.seeds[0]).epochs,
            "seeds": list(block.seeds),
            "missing": runner.missing.get(block.folder),
            "data": None if facts is None else {"name": config.data.name, **facts.as_dict()},
            "model": config.model,
            "config": to_dict(config),
            "sites": list(sites),
            "rules": rules,
        }
    )


def _rule(runner: Runner, comparison: Comparison, block: Block, candidate: Candidate) -> Results:
    configs = [run_config(comparison.config, candidate, seed) for seed in block.seeds]
    runs = [_run(runner, config) for config in configs]
    reasons = [run["message"] for run in runs if run["status"] == "refused"]
    entry = candidate.entry
    return {
        "rule": entry.rule,
        "label": candidate.label,
        "options": entry.options,
        **{name: getattr(configs[0], name) for name in CONDITIONS},
        **_rates(runner, comparison, candidate, configs),
        "search": candidate.trials,
        "refused": candidate.refused or (reasons[0] if len(reasons) == len(runs) else None),
        "runs": [] if candidate.refused else runs,
    }


def _rates(
    runner: Runner, comparison: Comparison, candidate: Candidate, configs: list[TrainConfig]
) -> Results:
    """The rates that its runs have, which may be older than the config, and how they were found."""
    folders = [RunFolder(Path(config.out or "")) for config in configs]
    finished = (folder.config().resolved() for folder in folders if folder.result())
    run, planned = next(finished, configs[0]), configs[0]
    as_planned = (run.forward.lr, run.feedback.lr) == (planned.forward.lr, planned.feedback.lr)
    on, searched = comparison.search_on, None
    if as_planned and candidate.trials and on is not None:
        searched = on or "search"
    follows = runner.follows(comparison, candidate.label) if as_planned else None
    return {
        "rates": rates_of(run, candidate.learned),
        "searched": searched,
        "follows": follows,
        "baseline_only": bool(searched or follows)
        and on is not None
        and runner.plan.comparisons[on].config.search.baseline_only,
    }


def _run(runner: Runner, config: TrainConfig) -> Results:
    """A run as the results hold it; in a large grid with the main measures of each site only."""
    run = run_record(config)
    if runner.plan.single:
        return run
    kept = [
        {"epoch": probe["epoch"], "sites": {s: _measures(m) for s, m in probe["sites"].items()}}
        for probe in run["alignment"]
    ]
    return {**run, "alignment": kept}


def _measures(site: Results) -> Results:
    """Four numbers of a site, to five digits: a grid has many thousands."""
    return {key: float(f"{site[key]:.5g}") for key in MEASURES if site.get(key) is not None}
