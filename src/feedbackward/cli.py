"""The command line: `feedbackward train`, `compare`, `probe`, `cost` and `rules`.

Exit codes: 0 success; 2 anything that feedbackward refuses, a diverged run included, with one sentence on
stderr; 130 and 143 a run that Ctrl-C or SIGTERM stopped, after saving it; 1 a fault of feedbackward
itself, with its traceback, or a comparison in which a run failed.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from feedbackward import errors

USAGE = """\
usage: feedbackward COMMAND [options]

  train    train one network by one rule
  compare  train by several rules and seeds, or a whole grid of settings, and write a report
  probe    measure how near a trained run's gradients are to backprop's
  cost     count what a training step costs, or measure it, beside backprop
  rules    list the rules, with what each needs; --cost adds what each costs

feedbackward COMMAND --help lists the options. A first look, in under four minutes:
  feedbackward compare --config demo
"""
# of the experiment layer, which needs more than the library does
NEEDED = "jsonargparse docstring_parser yaml rich safetensors datasets huggingface_hub jinja2 matplotlib tensorboard"
_warned: set[str] = set()  # the warnings that this command has printed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            _warned.clear()
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
    _check_installed()
    from feedbackward.experiment.config.renamed import renamed, unknown

    command, rest = renamed(arguments[0], arguments[1:])
    if command not in COMMANDS:
        raise errors.ConfigError(unknown(command, [*COMMANDS]))
    if command != "train" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise errors.ConfigError(
            f"torchrun started {os.environ['WORLD_SIZE']} processes, and {command} runs in one: start it without torchrun. "
            "`compare --parallel.pipeline N` starts N processes for each training, `compare --workers` several trainings at once"
        )
    return COMMANDS[command](rest)


def _train(arguments: list[str]) -> int:
    from feedbackward.experiment.config.arguments import parse
    from feedbackward.experiment.config.schema import TrainConfig
    from feedbackward.experiment.config.tasks import KINDS

    config = parse(TrainConfig, arguments, "train").resolved()
    from feedbackward.experiment.training.interrupts import InterruptedRunError, Interrupts
    from feedbackward.experiment.training.progress import Progress
    from feedbackward.experiment.training.runfolder import RunFolder, new_folder
    from feedbackward.experiment.training.train import train

    try:
        with new_folder(config), Interrupts() as interrupts, Progress() as progress:
            result = train(config, progress, interrupts)
    except InterruptedRunError as stop:
        again = f"feedbackward train --config {config.out}/config.yaml --resume"
        return _stopped(stop.signum, config.out, again)
    if os.environ.get("RANK", "0") != "0":  # one process of several reports
        return 0
    from feedbackward.experiment.training.card import write_card

    write_card(RunFolder.existing(str(config.out)))
    kind = KINDS[config.task]
    score = kind.measure.in_words(result[f"test_{kind.measure.key}"], digits=2, named=True)
    print(f"test {score}, on {kind.unit} that no choice was made with")
    print(
        f"weights: {config.out}/model.safetensors  metrics: {config.out}/metrics.jsonl  model card: {config.out}/README.md"
    )
    return 0


def _compare(arguments: list[str]) -> int:
    from feedbackward.experiment.config.arguments import read
    from feedbackward.experiment.config.schema import CompareCommand

    # answers --help and a flag that does not exist before PyTorch is imported
    read(CompareCommand, arguments, "compare")
    from feedbackward.experiment.grid.compare import parse_compare, run_and_gather, show_plan

    plan, command = parse_compare(arguments)
    from rich.console import Console

    from feedbackward.experiment.grid.gather import gather
    from feedbackward.experiment.grid.runner import opened
    from feedbackward.experiment.report.report import failed_cells, print_report, write_report
    from feedbackward.experiment.training.environment import command_line
    from feedbackward.experiment.training.interrupts import InterruptedRunError, Interrupts

    console, out, again = Console(), plan.options.out, command_line()
    if command.dry_run:
        show_plan(plan, command.only, console)
        return 0
    overwrite, signum = command.overwrite and not command.report_only, 0
    try:
        with (
            Interrupts() as interrupts,
            opened(plan, command.only, command.workers, interrupts, overwrite) as runner,
        ):
            if command.report_only:
                results = gather(runner)
            else:
                results, signum = run_and_gather(runner, console, interrupts)
    except InterruptedRunError as stop:  # before there was anything to report
        return _stopped(stop.signum, out, again)
    paths = write_report(results, out)
    if signum:
        return _stopped(signum, out, again)
    print_report(results, console)
    print(f"\nreport: {paths['report.html']}")
    if failed := failed_cells(results) + sum(runner.failed.values()):
        print(
            f"feedbackward: {failed} cells or trials failed ({out}/compare.log has the reasons); "
            "the same command tries them again",
            file=sys.stderr,
        )
    return 1 if failed else 0


def _probe(arguments: list[str]) -> int:
    from feedbackward.experiment.config.parser import Parser

    about = "Measure how near a trained run's gradients are to backprop's, on held-out images."
    parser = Parser("probe", about)
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument(
        "--images", type=int, help="number of held-out images (default: that of the run's config)"
    )
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--data", help="where the run's data are now, if they have been moved")
    parser.add_argument("--data-root", help="the same for data sets known by name")
    options = parser.parse_args(arguments)
    from feedbackward.experiment.training.inspect import probe_run

    probe_run(options.run, options.images, options.json, options.data, options.data_root)
    return 0


def _cost(arguments: list[str]) -> int:
    from feedbackward.experiment.config.arguments import read
    from feedbackward.experiment.config.cost import CostConfig

    read(CostConfig, arguments, "cost")
    from feedbackward.experiment.benchmark.subject import parse_cost

    config = parse_cost(arguments)
    from feedbackward.experiment.benchmark.cost_report import run_cost

    return run_cost(config)


def _rules(arguments: list[str]) -> int:
    from feedbackward.experiment.config.parser import Parser

    parser = Parser("rules", "List the rules, with what each needs.")
    parser.add_argument(
        "--format", choices=["table", "markdown", "json"], default="table", help="(default: table)"
    )
    parser.add_argument(
        "--cost", action="store_true", help="also count what each rule costs on vgg6"
    )
    options = parser.parse_args(arguments)
    from feedbackward.experiment.report.rules import print_rules

    print_rules(options.format, options.cost)
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "compare": _compare,
    "probe": _probe,
    "cost": _cost,
    "rules": _rules,
}


def _check_installed() -> None:
    missing = [name for name in NEEDED.split() if find_spec(name) is None]
    if missing:
        raise errors.ConfigError(
            f"the command line needs {', '.join(missing)}: pip install 'feedbackward[experiment]'"
        )


def _stopped(signum: int, folder: str | None, again: str) -> int:
    print(f"feedbackward: stopped; saved to {folder}; go on with: {again}", file=sys.stderr)
    return 128 + signum


def _warn(message: Warning | str, *where: object, **more: object) -> None:
    """One line, once, without the place in the code that a user cannot do anything about."""
    text = " ".join(str(message).split())
    if text not in _warned:
        _warned.add(text)
        print(f"feedbackward: warning: {text}", file=sys.stderr)


def _fail(text: str) -> int:
    # a text of the command line may hold bytes that are no characters
    text = " ".join(text.split()).encode("utf-8", "backslashreplace").decode()
    print(f"feedbackward: error: {text}", file=sys.stderr)
    return 2
