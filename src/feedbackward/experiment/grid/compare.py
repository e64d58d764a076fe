"""`compare`: run a grid, or one comparison as a grid of one cell, and gather its results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from feedbackward.errors import ConfigError
from feedbackward.experiment.config.arguments import parse, read
from feedbackward.experiment.config.files import from_dict, merged
from feedbackward.experiment.config.schema import CompareCommand, CompareConfig, Only, slug
from feedbackward.experiment.grid.costs import measure
from feedbackward.experiment.grid.definition import load_grid
from feedbackward.experiment.grid.gather import gather
from feedbackward.experiment.grid.layout import title
from feedbackward.experiment.grid.plan import Options, Plan, expand, single
from feedbackward.experiment.grid.runner import Runner, opened
from feedbackward.experiment.grid.selection import Selection
from feedbackward.experiment.training.interrupts import InterruptedRunError, Interrupts

# flags that say how a grid is run, and not what its comparisons are
RUN = (
    "title",
    "out",
    "overwrite",
    "only",
    "scale",
    "workers",
    "executor",
    "dry_run",
    "report_only",
)


def parse_compare(arguments: Sequence[str]) -> tuple[Plan, CompareCommand]:
    """What the command line asks to compare: one comparison, or the grid of a config file.

    Raises ConfigError for an unknown flag or key, or a value that no comparison can have.
    """
    files, flags = read(CompareCommand, arguments, "compare")
    grids = [file for file, given in files if "sections" in given]
    if not grids:
        command = parse(CompareCommand, arguments, "compare")
        plan = single(command.comparison(), command.scale, executor(command))
    else:
        if len(grids) > 1:
            raise ConfigError(f"give one grid at a time, not {grids[0]} and {grids[1]}")
        given = {key: value for key, value in flags.items() if key in RUN}
        command = from_dict(CompareCommand, given, "the command line")
        changes = {key: value for key, value in flags.items() if key not in RUN}
        for _, values in reversed([pair for pair in files if pair[0] not in grids]):
            changes = merged(values, changes)
        grid = load_grid(grids[0])
        small = "" if command.scale == 1 else f"-{command.scale:g}"
        out = command.out or f"runs/{slug(grid.name)}{small}"
        plan = expand(grid, Options(out, command.scale, changes, executor(command)))
    if command.workers is not None and command.workers < 1:
        raise ConfigError(f"--workers is {command.workers}: it must be at least 1")
    return plan, command


def executor(command: CompareCommand) -> str:
    """What runs the cells; a report of what is there needs no cluster."""
    return "local" if command.report_only or command.dry_run else command.executor


def compare(config: CompareConfig, console: Console, interrupts: Interrupts) -> dict[str, Any]:
    """Run one comparison in this process, and return its results (as in results.json).

    A finished run is skipped and an interrupted one is resumed. Rates are picked on held-out images
    only; the test images are used once per finished run. A rule that the net refuses is reported.

    Raises:
        InterruptedRunError: a signal came; the running cell is saved.
        FeedbackError: the config, the data or the folder is not usable. Divergence is a result.
    """
    plan = single(config)
    with opened(plan, Only(), 1, interrupts, config.overwrite) as runner:
        runner.run(console, interrupts)
        measure(runner, console, interrupts)
        return gather(runner)


def run_and_gather(
    runner: Runner, console: Console, interrupts: Interrupts
) -> tuple[dict[str, Any], int]:
    """Run the grid; returns the results so far, and the signal that stopped it or 0."""
    try:
        runner.run(console, interrupts)
        measure(runner, console, interrupts)
    except InterruptedRunError as stop:
        return gather(runner), stop.signum
    return gather(runner), 0


def show_plan(plan: Plan, only: Only, console: Console) -> None:
    """Print what would be run, without a look at the data."""
    selection = Selection(plan, only)
    cells = list(selection.cells())
    console.print(f"{plan.grid.title}: {len(cells)} cells", highlight=False, markup=False)
    for block in selection.blocks():
        ours = [(c.label, str(seed)) for folder, c, seed in cells if folder == block.folder]
        labels, seeds = (", ".join(dict.fromkeys(names)) for names in zip(*ours, strict=True))
        config = plan.of(block).config
        name = title(plan, block) or f"{config.model} on {config.data.name}"
        parts = (name, labels, f"seeds {seeds}", f"epochs {config.epochs or 'as the recipe'}")
        text = ": ".join(filter(None, (block.section, "; ".join(parts))))
        console.print(text, highlight=False, markup=False, soft_wrap=True)
