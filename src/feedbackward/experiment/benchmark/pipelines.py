"""`feedbackward cost --stages`: what a net divided over processes would take, simulated from the
times of its segments on this machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from feedbackward.attaching import attach
from feedbackward.experiment.benchmark.pipeline_plots import plot_stages
from feedbackward.experiment.benchmark.subject import Subject
from feedbackward.experiment.benchmark.units import sized
from feedbackward.experiment.config.cost import CostConfig
from feedbackward.parallel.simulate import SCHEDULES, Link, StageCost, simulate, spread
from feedbackward.parallel.split import find_places, segment_costs
from feedbackward.rules import BP

ABOUT = """\
Simulated, from the times of each segment on this machine, one micro-batch at a time and one thread per process. Speed: of one
process, whose step is all forward and backward passes of backprop in turn. One step: between two barriers. Steady: of many steps
without a barrier. Bubble: the part of the steady steps in which processes wait. Back: bytes that reach a process for its backward.
Held: activities on the process that holds most. gpipe, 1f1b, zero-bubble: backprop. star: direct feedback, forwards first;
star-few: one forward and one backward in turn; highway: the error goes from process to process; relays: four processes send on
an error; local: losses of their own."""


def simulate_stages(config: CostConfig) -> int:
    """Print a table per model and number of stages, and write the files; returns the exit code."""
    if config.threads is None:
        torch.set_num_threads(1)
    console, found = Console(), list[dict[str, Any]]()
    for model in config.models:
        with Console(stderr=True).status(f"timing {model}"):
            segments = time_segments(config, model)
        for stages in config.stages:
            rows = simulated_rows(config, segments, stages)
            found.append({"model": model, "stages": stages, "rows": rows})
            _print(f"{model}, {_title(config, stages, len(segments))}", rows, console)
    print(ABOUT)
    if config.json:
        # imports this file
        from feedbackward.experiment.benchmark.cost_report import document, write_json

        write_json(Path(config.json), document(config, found))
    if config.plot:
        plot_stages(Path(config.plot), config, found, links(config, segments))
    return 0


def links(config: CostConfig, segments: Sequence[StageCost]) -> list[dict[str, Any]]:
    """Rows for links from 10 Mbit/s to 100 Gbit/s, at the largest number of stages."""
    stages = max(config.stages)
    speeds = [float(10**i) * step for i in range(1, 6) for step in (1, 3)][:-1]
    return [
        {"link": speed, "rows": simulated_rows(replace(config, link=speed), segments, stages)}
        for speed in speeds
    ]


def time_segments(config: CostConfig, model: str) -> list[StageCost]:
    """The costs of the segments between places where the net can be divided, for one micro-batch."""
    subject = Subject(config, model, torch.device("cpu"))
    x, _ = subject.batch()
    part = x[: max(2, config.batch // config.micro_batches)]
    learner = attach(subject.net(), BP(), example=part, sites=subject.sites)
    places, _ = find_places(learner, part, [])
    return segment_costs(learner, part, places)


def simulated_rows(
    config: CostConfig, segments: Sequence[StageCost], stages: int
) -> list[dict[str, Any]]:
    """A row per schedule."""
    parts = spread(segments, stages)
    seconds = sum(s.forward + s.inputs + s.weights for s in segments)
    one = config.micro_batches * seconds
    # numbers of four bytes
    error = 4 * config.classes * config.batch // config.micro_batches
    bandwidth = math.inf if config.link is None else config.link * 1e6 / 8
    links = Link(bandwidth, config.latency / 1000)
    rows = []
    for schedule in SCHEDULES:
        made = simulate(schedule, parts, config.micro_batches, links=links, error_bytes=error)
        speeds = {"speed": one / made.isolated, "steady_speed": one / made.steady}
        rows.append({"schedule": schedule, **asdict(made), **speeds})
    return rows


def _title(config: CostConfig, stages: int, segments: int) -> str:
    link = "links without bounds" if config.link is None else f"links of {config.link:g} Mbit/s"
    late = f", {config.latency:g} ms" if config.latency else ""
    parts = f"batch {config.batch} in {config.micro_batches}"
    equal = f" (equal parts of {segments} segments)" if stages > segments else ""
    return f"{stages} stages{equal}, {parts}, {link}{late}"


def _print(title: str, rows: Sequence[dict[str, Any]], console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("schedule")
    for heading in (
        "one step ms",
        "speed",
        "steady ms",
        "speed",
        "bubble",
        "forward",
        "back",
        "held",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["schedule"],
            f"{1000 * row['isolated']:.1f}", f"{row['speed']:.2f}",
            f"{1000 * row['steady']:.1f}", f"{row['steady_speed']:.2f}",
            f"{100 * row['bubble']:.0f} %",
            sized(row["forward_bytes"]), sized(row["backward_bytes"]), sized(max(row["held"])),
        )  # fmt: skip
    console.print(title, style="bold", soft_wrap=True, highlight=False)
    console.print(table)
