"""What the rules of a comparison cost: counted for all, and measured where the config asks for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from feedbackward.errors import FeedbackError
from feedbackward.experiment.benchmark.counted import count_rows
from feedbackward.experiment.benchmark.step_costs import measure_costs
from feedbackward.experiment.benchmark.subject import resolved
from feedbackward.experiment.config.cost import CostConfig
from feedbackward.experiment.config.files import to_dict
from feedbackward.experiment.config.schema import RuleEntry
from feedbackward.experiment.grid.candidates import BASELINE, Candidate, run_config
from feedbackward.experiment.grid.plan import Comparison
from feedbackward.experiment.grid.runner import Runner
from feedbackward.experiment.training.interrupts import Interrupts
from feedbackward.experiment.training.runfolder import RunFolder

Results = dict[str, Any]


def measure(runner: Runner, console: Console, interrupts: Interrupts) -> None:
    """Measure time and memory of a step in every comparison that wants it and has finished runs."""
    for comparison in runner.plan.comparisons.values():
        config = comparison.config
        candidates = [runner.candidate(comparison, c) for c in comparison.candidates]
        running = [c for c in candidates if c.refused is None]
        runs = [run_config(config, c, config.seeds[0]) for c in running]
        done = all(RunFolder(Path(run.out or "")).result() is not None for run in runs)
        wanted = {"steps": config.timing_steps, "runs": [to_dict(run) for run in runs]}
        file = _file(runner, comparison, "measured.json")
        if not (config.timing_steps and runs and done) or _read(file, wanted) is not None:
            continue
        console.print("measuring time and memory per step ...", highlight=False)
        costs = measure_costs(runs, config.timing_steps, interrupts.check)
        baseline = costs[0] if running[0].entry.rule == BASELINE else {}
        for cost in costs:
            cost["step_ratio"] = _ratio(cost["step_ms"], baseline.get("step_ms"))
            cost["peak_ratio"] = _ratio(cost["peak_bytes"], baseline.get("peak_bytes"))
        found = {c.label: cost for c, cost in zip(running, costs, strict=True)}
        _write(file, wanted, found)


def _ratio(value: float | None, baseline: float | None) -> float | None:
    return value / baseline if value is not None and baseline else None


def costs_of(runner: Runner, comparison: Comparison) -> dict[str, Results]:
    """By label, what a step costs: `cost` as counted, and what was measured of time and memory."""
    counted = count(runner, comparison)
    measured = _read(_file(runner, comparison, "measured.json")) or {}
    found = {}
    for candidate in comparison.candidates:
        cost = counted.get(candidate.label)
        found[candidate.label] = {
            "cost": cost,
            "feedback_bytes": cost["feedback_bytes"] if cost else None,
            **measured.get(candidate.label, {}),
        }
    return found


def count(runner: Runner, comparison: Comparison) -> dict[str, Results]:
    """Backward steps, multiply-adds relative to backprop's and bytes of feedback, by label."""
    facts, config = runner.facts.get(comparison.folder), comparison.config
    if facts is None or len(facts.shape) != 3 or facts.shape[1] != facts.shape[2]:
        return {}
    candidates = comparison.candidates
    counting = CostConfig(
        models=[config.model],
        model_options=config.model_options,
        rules=list[str | RuleEntry](candidate.entry for candidate in candidates),
        sites=config.sites,
        error_at=config.error_at,
        norm=config.norm,
        batch=run_config(config, candidates[0], 0).batch_size or 1,
        classes=facts.classes,
        channels=facts.shape[0],
        size=facts.shape[1],
    )
    file, wanted = _file(runner, comparison, "costs.json"), to_dict(counting)
    known = _read(file, wanted)
    if known is not None:
        return known
    found = _count(counting, candidates)
    _write(file, wanted, found)
    return found


def _count(counting: CostConfig, candidates: list[Candidate]) -> dict[str, Results]:
    try:
        first, *rows = count_rows(resolved(counting), counting.models[0])
    except (FeedbackError, RuntimeError):  # a net that cannot be counted has a table all the same
        return {}
    assert first.cost is not None
    others = iter(rows)
    found = {}
    for candidate in candidates:
        cost = (first if candidate.entry.rule == BASELINE else next(others)).cost
        if cost is not None:
            found[candidate.label] = {
                "steps": cost.steps,
                "macs": cost.total / first.cost.total,
                "feedback_bytes": cost.feedback_bytes,
            }
    return found


def _file(runner: Runner, comparison: Comparison, name: str) -> Path:
    return Path(runner.plan.options.out) / comparison.folder / name


def _read(file: Path, wanted: Results | None = None) -> dict[str, Results] | None:
    """The numbers that a file keeps, if they are of what is wanted."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        same = wanted is None or kept["counted"] == json.loads(json.dumps(wanted))
        return dict(kept["rules"]) if same else None
    except (OSError, ValueError, KeyError):
        return None


def _write(file: Path, wanted: Results, found: dict[str, Results]) -> None:
    if file.parent.is_dir():
        RunFolder(file.parent).write_json(file, {"counted": wanted, "rules": found})
