"""Time and memory of a training step of several runs, and the sizes of what they hold."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from feedbackward.errors import DivergenceError
from feedbackward.experiment.config.schema import TrainConfig
from feedbackward.experiment.training.building import find_device, shared_data
from feedbackward.experiment.training.measure import WARM_UP, peak_bytes, step_times
from feedbackward.experiment.training.run import Run


@dataclass(frozen=True)
class Costs:
    """Of one rule: milliseconds and peak bytes of a step (None where not measured), and sizes."""

    step_ms: float | None
    peak_bytes: int | None
    feedback_bytes: int
    parameters: int
    sites: tuple[str, ...]

    def as_dict(self, baseline: Costs | None) -> dict[str, Any]:
        """For the results: step and peak also as ratios to the baseline's."""
        return {
            "feedback_bytes": self.feedback_bytes,
            "step_ms": self.step_ms,
            "step_ratio": _ratio(self.step_ms, baseline.step_ms if baseline else None),
            "peak_bytes": self.peak_bytes,
            "peak_ratio": _ratio(self.peak_bytes, baseline.peak_bytes if baseline else None),
        }


def measure_costs(
    configs: Sequence[TrainConfig], repeats: int, check: Callable[[], None]
) -> list[Costs]:
    """Costs of the runs' steps on a batch of their data, from fresh weights; ``repeats`` 0 measures no step.

    Peaks are taken one run at a time; times with all runs in memory, their steps interleaved. ``check`` is called
    before every step, and may raise.
    """
    if configs[0].threads:
        torch.set_num_threads(configs[0].threads)
    sizes, peaks = [], []
    for config in configs:
        run = _fresh(config)
        sizes.append(_sizes(run))
        peaks.append(_peak(run, check) if repeats else None)
        del run
        gc.collect()
    times: list[float] | None = None
    if repeats:
        runs = [_fresh(config) for config in configs]
        times = _times(runs, repeats, check)
    return [
        replace(size, peak_bytes=peak, step_ms=times[i] if times else None)
        for i, (size, peak) in enumerate(zip(sizes, peaks, strict=True))
    ]


def _fresh(config: TrainConfig) -> Run:
    """The run as it starts, but at a constant rate: more steps are taken than a short schedule may have."""
    forward, feedback = (replace(c, schedule="constant") for c in (config.forward, config.feedback))
    config = replace(config, forward=forward, feedback=feedback)
    return Run(config, shared_data(config.data), find_device(config.device))


def _sizes(run: Run) -> Costs:
    parameters = sum(p.numel() for p in run.learner.model.parameters())
    sites = tuple(site.name for site in run.learner.sites)
    return Costs(None, None, run.learner.feedback_bytes, parameters, sites)


def _peak(run: Run, check: Callable[[], None]) -> int | None:
    step, batch = _step(run, check)
    try:
        for _ in range(WARM_UP):
            step()
        return peak_bytes(step, [*_tensors(run), *batch], run.device)
    except DivergenceError:
        return None


def _times(runs: Sequence[Run], repeats: int, check: Callable[[], None]) -> list[float] | None:
    try:
        return step_times([_step(run, check)[0] for run in runs], repeats, runs[0].device)
    except DivergenceError:
        return None


def _step(run: Run, check: Callable[[], None]) -> tuple[Callable[[], None], tuple[Tensor, Tensor]]:
    batch = next(run.loader.epoch(0))

    def step() -> None:
        check()
        run.step(*batch)

    return step, batch


def _tensors(run: Run) -> Iterator[Tensor]:
    """Everything that stays alive between steps."""
    yield from (*run.learner.parameters(), *run.learner.buffers())
    if run.stale is not None:
        state = run.stale.state_dict()
        yield from (
            grad for queue in state["waiting"].values() for grad in queue if grad is not None
        )
        yield from state["before"].values()
    for weights in run.weights.values():
        for state in weights.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def _ratio(value: float | None, baseline: float | None) -> float | None:
    return value / baseline if value is not None and baseline else None
