"""`feedbackward study`: its options, and what it does with them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from feedbackward.errors import ConfigError
from feedbackward.experiment.config.files import check_keys, parse_yaml
from feedbackward.experiment.config.parser import Parser
from feedbackward.experiment.config.schema import CompareConfig, slug
from feedbackward.experiment.grid.definition import Study, load_study, nested, shipped
from feedbackward.experiment.grid.grid import Options, expand
from feedbackward.experiment.grid.layout import title
from feedbackward.experiment.grid.results import command, gather
from feedbackward.experiment.grid.running import Filters, clear, opened, run
from feedbackward.experiment.grid.study_report import print_study, write_study_report
from feedbackward.experiment.grid.texts import counts
from feedbackward.experiment.training.interrupts import InterruptedRunError, Interrupts

ABOUT = """\
Run a study: a grid of comparisons that a config describes (rules x models x data sets x seeds, or any other settings), cell by
cell, and tell it in one table and one page. A cell that is finished is skipped and one that was stopped goes on, so the same
command continues after Ctrl-C, a crash or a reboot. What has no data is shown as such, with how to get it, and so is a rule that
a net refuses.
"""
MORE = """\
examples:
  feedbackward study paper --list                                    what it would run
  feedbackward study paper --scale 0.05 --data-root data             5 % of the images, within 90 minutes on two cores
  feedbackward study paper --scale 0.05 --models small_cnn --rules bp,dkp --data-names cifar10
  feedbackward study my_study.yaml --set epochs=1 --out runs/quick
docs/study.md says how a study is written. In its folder: results.json, table.md, report.html, study.log and a run folder per cell.
"""


def parser() -> Parser:
    """The options of `feedbackward study`."""
    made = Parser("study", ABOUT, epilog=MORE, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add(
        "study",
        metavar="NAME",
        help=f"a study that comes with the package ({shipped()}), or a YAML file",
    )
    add("--scale", type=float, default=1.0, metavar="F", help="share of the training images, e.g. 0.05; below 1 the study's settings "
        "for small runs count (fewer epochs and seeds)")  # fmt: skip
    add(
        "--data-root",
        metavar="DIR",
        help="folder with data sets laid out as on the hub, read offline",
    )
    add(
        "--out",
        metavar="DIR",
        help="folder of the results (default: runs/study-NAME, with the scale)",
    )
    add("--workers", type=int, metavar="N", help="cells at once, each in a process and on a thread of its own (default: one per core, "
        "as memory allows; 1 on a GPU)")  # fmt: skip
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        help="where to train (default: as the study says)",
    )
    for name, what in (
        ("sections", "sections"),
        ("models", "models"),
        ("data-names", "data sets"),
        ("rules", "rules or labels"),
    ):
        add(f"--{name}", type=_names, metavar="A,B", help=f"run these {what} only")
    add("--seeds", type=_numbers, metavar="0,1", help="run these seeds only")
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="sets", help="a setting of every comparison, e.g. epochs=1 or "
        "data.size=16; may be repeated")  # fmt: skip
    add("--list", action="store_true", help="show the grid and run nothing")
    add(
        "--report",
        action="store_true",
        help="write table and page of what is there and run nothing",
    )
    add("--overwrite", action="store_true", help="run these cells anew, finished ones too")
    return made


def study_command(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    given = parser().parse_args(arguments)
    if given.workers is not None and given.workers < 1:
        raise ConfigError(f"--workers is {given.workers}: it must be at least 1")
    study = load_study(given.study)
    small = "" if given.scale == 1 else f"-{given.scale:g}"
    out = given.out or f"runs/study-{slug(study.name)}{small}"
    options = Options(
        out, given.scale, dict(map(_setting, given.sets)), given.data_root, given.device
    )
    filters = Filters(given.models, given.data_names, given.rules, given.sections, given.seeds)
    console = Console()
    if given.list:
        return _show(study, options, filters, console)
    return _go(given, study, options, filters, console)


def _go(given: Any, study: Study, options: Options, filters: Filters, console: Console) -> int:
    code = 0
    try:
        with Interrupts() as interrupts:
            console.print("looking at the data sets ...", highlight=False)
            with opened(study, options, filters, given.workers, interrupts) as running:
                if given.overwrite and not given.report:
                    clear(running)
                try:
                    if not given.report:
                        run(running, console, interrupts)
                except InterruptedRunError as stop:
                    code = 128 + stop.signum
                results = gather(running)
    except InterruptedRunError as stop:  # before there was anything to report
        return _stopped(128 + stop.signum, options.out)
    paths = write_study_report(results, options.out)
    if code:
        return _stopped(code, options.out)
    print_study(results, console)
    print(f"\ntable: {paths['table.md']}\npage: {paths['report.html']}")
    if failed := counts(results)["failed"] + sum(running.failed.values()):
        told = f"{failed} cells or trials failed (their reasons are above and in study.log); the same command tries them again"
        print(f"feedbackward: {told}", file=sys.stderr)
        return 1
    return 0


def _stopped(code: int, out: str) -> int:
    """The last words of a study that was interrupted."""
    print(f"feedbackward: stopped; saved to {out}; go on with: {command()}", file=sys.stderr)
    return code


def _show(study: Study, options: Options, filters: Filters, console: Console) -> int:
    """What would be run, without a look at the data."""
    plan = expand(study, options)
    filters.check(plan)
    cells = list(filters.cells(plan))
    console.print(f"{study.title}: {len(cells)} cells", highlight=False, markup=False)
    for block in filters.blocks(plan):
        ours = [
            (contender.label, seed) for folder, contender, seed in cells if folder == block.folder
        ]
        labels, seeds = (
            dict.fromkeys(label for label, _ in ours),
            dict.fromkeys(str(seed) for _, seed in ours),
        )
        epochs = plan.of(block).config.epochs
        parts = (
            title(plan, block),
            ", ".join(labels),
            f"seeds {', '.join(seeds)}",
            f"epochs {epochs or 'as the recipe'}",
        )
        text = f"{block.section}: {'; '.join(parts)}"
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    return 0


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.strip("[]").split(",") if part.strip()]


def _numbers(text: str) -> list[int]:
    return [int(part) for part in _names(text)]


def _setting(text: str) -> tuple[str, Any]:
    """`epochs=1` as a key and a value."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text} must have the form key=value, as in --set epochs=1")
    check_keys(CompareConfig, nested(key, None), "--set")
    return key, parse_yaml(value)
