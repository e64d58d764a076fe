"""Time and memory of a training step of several runs."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from feedbackward.errors import DivergenceError
from feedbackward.experiment.config.schema import TrainConfig
from feedbackward.experiment.training.building import find_device, shared_data
from feedbackward.experiment.training.measure import WARM_UP, peak_bytes, step_times
from feedbackward.experiment.training.run import Run


def measure_costs(
    configs: Sequence[TrainConfig], repeats: int, check: Callable[[], None]
) -> list[dict[str, Any]]:
    """Milliseconds and peak bytes of the runs' steps on a batch of their data, from fresh weights.

    Peaks are taken one run at a time, times with all runs in memory and their steps interleaved. What
    diverges has None. `check` is called before every step, and may raise.
    """
    if configs[0].threads:
        torch.set_num_threads(configs[0].threads)
    costs: list[dict[str, Any]] = []
    for config in configs:
        run = _fresh(config)
        costs.append({"feedback_bytes": run.learner.feedback_bytes, "peak_bytes": None})
        step, batch = _step(run, check)
        with contextlib.suppress(DivergenceError):
            for _ in range(WARM_UP):
                step()
            costs[-1]["peak_bytes"] = peak_bytes(
                step, [*_tensors(run), *tree_leaves(batch)], run.device
            )
        del run, step
        gc.collect()
    times: Sequence[float | None] = [None] * len(configs)
    with contextlib.suppress(DivergenceError):
        runs = [_fresh(config) for config in configs]
        times = step_times([_step(run, check)[0] for run in runs], repeats, runs[0].device)
    return [cost | {"step_ms": time} for cost, time in zip(costs, times, strict=True)]


def _fresh(config: TrainConfig) -> Run:
    """The run as it starts, at a constant rate: more steps are taken than a short schedule may have."""
    forward, feedback = (replace(c, schedule="constant") for c in (config.forward, config.feedback))
    config = replace(config, forward=forward, feedback=feedback)
    return Run(config, shared_data(config.data, config.task), find_device(config.device))


def _step(run: Run, check: Callable[[], None]) -> tuple[Callable[[], None], tuple[Any, Tensor]]:
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
        for queue in state["waiting"].values():
            yield from (grad for grad in queue if grad is not None)
        yield from state["before"].values()
    for weights in run.weights.values():
        for state in weights.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))
