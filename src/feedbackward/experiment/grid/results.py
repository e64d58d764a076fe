"""Everything that a study's tables and page tell, gathered from its folder into one JSON document."""

from __future__ import annotations

import datetime
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from feedbackward.errors import FeedbackError
from feedbackward.experiment.benchmark.cost import CostConfig, count_rows
from feedbackward.experiment.config.files import to_dict
from feedbackward.experiment.config.schema import RuleEntry, TrainConfig
from feedbackward.experiment.grid.cells import Job, found
from feedbackward.experiment.grid.compare import (
    Cell,
    Contender,
    cell_config,
    described,
    finished_run,
    rates_of,
)
from feedbackward.experiment.grid.grid import Block, Comparison
from feedbackward.experiment.grid.layout import Table, column_name, tables, title
from feedbackward.experiment.grid.running import Running
from feedbackward.experiment.report.summary import VERSION, clean
from feedbackward.experiment.training.building import find_device
from feedbackward.experiment.training.environment import environment
from feedbackward.experiment.training.runfolder import RunFolder

Results = dict[str, Any]
MEASURES = (
    "angle",
    "norm_ratio",
    "bp_norm",
    "jacobian_cosine",
)  # of each site, of all that a probe gives


def gather(running: Running) -> Results:
    """The results of the whole study, what this invocation did not run included, as results.json has them."""
    plan = running.plan
    device = next(iter(plan.comparisons.values())).config.device
    return {
        "version": VERSION,
        "study": plan.study.name,
        "title": plan.study.title,
        "about": plan.study.about,
        "scale": plan.options.scale,
        "sets": dict(plan.options.sets or {}),
        "command": command(),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "environment": {**environment(find_device(device)), "workers": running.workers},
        "sections": [
            {
                "name": section.name,
                "title": section.title,
                "about": section.about,
                "tables": [
                    _table(running, table)
                    for table in tables(plan)
                    if table.section == section.name
                ],
            }
            for section in plan.study.sections
        ],
        "config": plan.study.text,
    }


def command() -> str:
    """The command line that this is."""
    return shlex.join(["feedbackward", *sys.argv[1:]])


def _table(running: Running, table: Table) -> Results:
    return {
        "title": table.title,
        "labels": table.labels,
        "blocks": [_block(running, block) for block in table.blocks],
    }


def _block(running: Running, block: Block) -> Results:
    """One comparison: the same document as `feedbackward compare` makes, with what a study adds."""
    comparison = running.plan.of(block)
    config, facts = comparison.config, running.facts.get(block.folder)
    ours = [c for c in comparison.contenders if c.label in block.labels]
    rules = [_rule(running, comparison, block, running.contender(comparison, c)) for c in ours]
    costs = _costs(running, comparison)
    for rule in rules:
        rule["cost"] = costs.get(rule["label"])
    runs = [run for rule in rules for run in rule["runs"]]
    sites = {site: None for run in runs for probe in run["alignment"] for site in probe["sites"]}
    return clean(
        {
            "version": VERSION,
            "title": title(running.plan, block),
            "column": column_name(running.plan, block),
            "folder": block.folder,
            "point": block.point,
            "epochs": cell_config(config, ours[0], block.seeds[0]).epochs,
            "seeds": list(block.seeds),
            "missing": running.missing.get(block.folder),
            "data": None if facts is None else {"name": config.data.name, **facts.as_dict()},
            "model": config.model,
            "config": to_dict(config),
            "sites": list(sites),
            "rules": rules,
        }
    )


def _rule(running: Running, comparison: Comparison, block: Block, contender: Contender) -> Results:
    found_cells = [_cell(comparison, contender, seed) for seed in block.seeds]
    reasons = [run["message"] for run in found_cells if run["status"] == "refused"]
    planned = cell_config(comparison.config, contender, block.seeds[0])
    return {
        **described(contender, planned),
        **_rates(running, comparison, contender, block, planned),
        "refused": contender.refused or (reasons[0] if len(reasons) == len(found_cells) else None),
        "runs": [] if contender.refused else found_cells,
    }


def _rates(
    running: Running,
    comparison: Comparison,
    contender: Contender,
    block: Block,
    planned: TrainConfig,
) -> Results:
    """The rates that its runs have, which may be older than the study's file, and how they were found."""
    folders = [
        RunFolder(Path(cell_config(comparison.config, contender, seed).out or ""))
        for seed in block.seeds
    ]
    run = next((folder.config().resolved() for folder in folders if folder.result()), planned)
    as_planned = (run.forward.lr, run.feedback.lr) == (planned.forward.lr, planned.feedback.lr)
    searched = as_planned and bool(contender.trials) and comparison.search_on
    follows = running.follows(comparison, contender.label) if as_planned else None
    on = running.plan.comparisons.get(comparison.search_on or "")
    return {
        "rates": rates_of(run, contender.learned),
        "searched": searched,
        "follows": follows,
        "baseline_only": bool(searched or follows)
        and on is not None
        and on.config.search.baseline_only,
    }


def _cell(comparison: Comparison, contender: Contender, seed: int) -> Results:
    """A cell as the results hold it, at its end or not."""
    config = cell_config(comparison.config, contender, seed)
    job = Job("", config, (), contender.label, 0)
    end = found(job)
    if end is not None and end.result is not None:
        run = finished_run(Cell("", job.folder.config().resolved()))
    else:
        rows = job.folder.rows()
        begun = "unfinished" if job.folder.checkpoint.exists() else "not run"
        run = {
            "seed": seed,
            "status": end.status if end else begun,
            "message": end.message if end else "",
            "test_accuracy": None,
            "validation_accuracy": None,
            "seconds": None,
            "epochs": [row for row in rows if row.get("kind") == "epoch"],
            "alignment": [row for row in rows if "sites" in row],
        }
    kept = [
        {"epoch": probe["epoch"], "sites": {s: _measures(m) for s, m in probe["sites"].items()}}
        for probe in run["alignment"]
    ]
    return {**run, "alignment": kept}


def _measures(site: Results) -> Results:
    """Four numbers of a site, to five digits: a study has many thousands."""
    return {key: float(f"{site[key]:.5g}") for key in MEASURES if site.get(key) is not None}


def _costs(running: Running, comparison: Comparison) -> dict[str, Results]:
    """Backward steps, multiply-adds relative to backprop's and bytes of feedback by label, counted once per comparison."""
    facts, config = running.facts.get(comparison.folder), comparison.config
    if facts is None or facts.shape[1] != facts.shape[2]:
        return {}
    batch = cell_config(config, comparison.contenders[0], 0).batch_size or 1
    entries = [c.entry for c in comparison.contenders]
    counting = CostConfig(
        model=config.model, rules=list[str | RuleEntry](entries), sites=config.sites, error_at=config.error_at,
        norm=config.norm, batch=batch, classes=facts.classes, channels=facts.shape[0], size=facts.shape[1],
    )  # fmt: skip
    kept, wanted = (
        Path(running.plan.options.out) / comparison.folder / "costs.json",
        to_dict(counting),
    )
    try:
        before = json.loads(kept.read_text(encoding="utf-8"))
        if before["counted"] == json.loads(json.dumps(wanted)):
            return dict(before["rules"])
    except (OSError, ValueError, KeyError):
        pass
    made = _counted(counting, [c.label for c in comparison.contenders])
    if kept.parent.is_dir():
        Job("", cell_config(config, comparison.contenders[0], 0), (), "", 0).folder.write_json(
            kept, {"counted": wanted, "rules": made}
        )
    return made


def _counted(counting: CostConfig, labels: list[str]) -> dict[str, Results]:
    try:
        first, *rows = count_rows(counting.resolved())
    except (FeedbackError, RuntimeError):  # a net that cannot be counted has a table all the same
        return {}
    assert first.cost is not None
    named = dict(
        zip([e.rule for e in counting.rules if isinstance(e, RuleEntry)], labels, strict=True)
    )
    found = {}
    if "bp" in named:
        found[named["bp"]] = first.cost
    others = [
        label
        for entry, label in zip(counting.rules, labels, strict=True)
        if getattr(entry, "rule", "") != "bp"
    ]
    found |= {
        label: row.cost for label, row in zip(others, rows, strict=True) if row.cost is not None
    }
    return {
        label: {
            "steps": cost.steps,
            "macs": cost.total / first.cost.total,
            "feedback_bytes": cost.feedback_bytes,
        }
        for label, cost in found.items()
    }
