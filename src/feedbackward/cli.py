"""The command line: `feedbackward train`, `compare`, `study`, `probe`, `bench`, `cost` and `rules`.

Exit codes: 0 success; 2 anything that feedbackward refuses, a diverged run included, with one sentence on
stderr; 130 and 143 a run stopped by Ctrl-C or SIGTERM, after saving it; 1 a fault of feedbackward itself,
with its traceback.
"""

from __future__ import annotations

import difflib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from feedbackward import errors
from feedbackward.experiment.config.parser import Parser

USAGE = """\
usage: feedbackward COMMAND [options]

  train    train one network by one rule
  compare  train by several rules and seeds under one recipe, and report
  study    a grid of comparisons that a config describes, in one table: feedbackward study paper --scale 0.05
  probe    how near a trained run's gradients are to backprop's
  bench    step time, throughput and memory beside backprop's
  cost     multiply-adds, bytes and steps in sequence on a network, counted without running it
  rules    what each rule needs and costs

feedbackward COMMAND --help lists the options. A first look, in under four minutes:
  feedbackward compare --config demo
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            return _dispatch(arguments)
    except errors.FeedbackError as error:
        return _fail(str(error))
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # the reader, `head` for one, has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        return _fail(f"{error}")
    except KeyboardInterrupt:
        print("\nfeedbackward: stopped at once; what was saved before is kept", file=sys.stderr)
        return 130


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if arguments[0] in ("--version", "-V"):
        from feedbackward import __version__

        print(f"feedbackward {__version__}")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}"
        raise errors.ConfigError(f"unknown command '{command}': {hint}")
    _check_installed()
    return COMMANDS[command](rest)


def _train(arguments: list[str]) -> int:
    from feedbackward.experiment.config.arguments import parse
    from feedbackward.experiment.config.schema import TrainConfig
    from feedbackward.experiment.training.interrupts import InterruptedRunError, Interrupts
    from feedbackward.experiment.training.progress import Progress

    config = parse(
        TrainConfig, arguments, "feedbackward train", "Train one network by one rule."
    ).resolved()
    from feedbackward.experiment.training.train import train

    try:
        with Interrupts() as interrupts, Progress() as progress:
            result = train(config, progress, interrupts)
    except InterruptedRunError as stop:
        return _stopped(
            stop.signum, config.out, f"train --config {config.out}/config.yaml --resume"
        )
    print(f"test accuracy {result['test_accuracy']:.2f} %, on images that no choice was made with")
    print(f"weights: {config.out}/model.safetensors  metrics: {config.out}/metrics.jsonl")
    return 0


def _compare(arguments: list[str]) -> int:
    from feedbackward.experiment.config.arguments import parse
    from feedbackward.experiment.config.schema import CompareConfig
    from feedbackward.experiment.training.interrupts import InterruptedRunError, Interrupts

    about = "Train by several rules and seeds under one recipe, and report."
    config = parse(CompareConfig, arguments, "feedbackward compare", about).resolved()
    from rich.console import Console

    from feedbackward.experiment.grid.compare import compare
    from feedbackward.experiment.report.report import print_summary, write_report

    console = Console()
    try:
        with Interrupts() as interrupts:
            results = compare(config, console, interrupts)
    except InterruptedRunError as stop:
        return _stopped(stop.signum, config.out, f"compare --config {config.out}/config.yaml")
    assert config.out is not None
    paths = write_report(results, config.out)
    print_summary(results, console)
    print(f"\nreport: {paths['report.html']}")
    return 0


def _study(arguments: list[str]) -> int:
    from feedbackward.experiment.grid.command import study_command

    return study_command(arguments)


def _probe(arguments: list[str]) -> int:
    parser = Parser(
        "probe", "How near a trained run's gradients are to backprop's, on held-out images."
    )
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument(
        "--images", type=int, help="held-out images (default: as in the run's config)"
    )
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args(arguments)
    from feedbackward.experiment.training.inspect import probe_run

    probe_run(options.run, options.images, options.json)
    return 0


def _rules(arguments: list[str]) -> int:
    parser = Parser("rules", "What each rule needs and costs.")
    parser.add_argument("--format", choices=["table", "markdown", "json"], default="table")
    options = parser.parse_args(arguments)
    from feedbackward.experiment.training.inspect import print_rules

    print_rules(options.format)
    return 0


def _bench(arguments: list[str]) -> int:
    from feedbackward.experiment.benchmark.cases import parse_bench

    config = parse_bench(arguments)
    from feedbackward.experiment.benchmark.report import run_bench

    return run_bench(config, arguments)


def _cost(arguments: list[str]) -> int:
    from feedbackward.experiment.benchmark.cost import parse_cost

    config = parse_cost(arguments)
    from feedbackward.experiment.benchmark.cost_report import run_cost

    return run_cost(config, arguments)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "compare": _compare,
    "study": _study,
    "probe": _probe,
    "bench": _bench,
    "cost": _cost,
    "rules": _rules,
}


def _check_installed() -> None:
    """The experiment layer needs more than the library does."""
    from importlib.util import find_spec

    needed = [
        "jsonargparse",
        "yaml",
        "rich",
        "safetensors",
        "datasets",
        "jinja2",
        "matplotlib",
        "tensorboard",
    ]
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise errors.ConfigError(
            f"the command line needs {', '.join(missing)}: pip install 'feedbackward[experiment]'"
        )


def _stopped(signum: int, folder: str | None, again: str) -> int:
    print(
        f"feedbackward: stopped; saved to {folder}; go on with: feedbackward {again}",
        file=sys.stderr,
    )
    return 128 + signum


def _warn(message: Warning | str, *where: object, **more: object) -> None:
    """One line, without the place in the code that a user cannot do anything about."""
    print(f"feedbackward: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _fail(text: str) -> int:
    print(f"feedbackward: error: {' '.join(text.split())}", file=sys.stderr)
    return 2
