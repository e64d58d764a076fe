"""Training in a pipeline of processes: each has a part of the network, and rank 0 has the folder."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from feedbackward.errors import ConfigError, DivergenceError, FeedbackError
from feedbackward.experiment.benchmark.pipeline_plots import plot_timeline
from feedbackward.experiment.config.schema import TrainConfig
from feedbackward.experiment.tasks import TASKS, AnyData
from feedbackward.experiment.training import checkpoint
from feedbackward.experiment.training.building import find_device, shared_data
from feedbackward.experiment.training.checkpoint import check_same_tensors
from feedbackward.experiment.training.environment import environment
from feedbackward.experiment.training.identity import data_identity
from feedbackward.experiment.training.interrupts import InterruptedRunError, Interrupts
from feedbackward.experiment.training.optimizing import Weights
from feedbackward.experiment.training.progress import Progress
from feedbackward.experiment.training.record import Record, check_loggers
from feedbackward.experiment.training.run import Run
from feedbackward.experiment.training.runfolder import RunFolder
from feedbackward.experiment.training.train import Loop
from feedbackward.parallel import Loss, pipeline, start

# what these settings do needs the whole network in one process, by their values that do nothing
_WHOLE = {
    "schedule": "joint",
    "staleness": 0,
    "backward_steps": 0,
    "predict_weights": False,
    "calibrate_every": 0,
    "freeze_feedback_after": None,
    "compile": False,
    "probe_every": 0,
}


def check_parallel(config: TrainConfig, processes: int) -> None:
    """Raise ConfigError where the run cannot be divided as it says over so many processes."""
    parallel = config.parallel
    if not parallel.pipeline:
        raise ConfigError(
            f"torchrun started {processes} processes, and this run is not divided: give --parallel.pipeline {processes}, "
            "or start it without torchrun"
        )
    if TASKS[config.task].whole:
        raise ConfigError(
            f"a batch of the task {config.task} cannot be divided into parts that count alike: leave out --parallel"
        )
    for name in ("pipeline", "data", "micro_batches"):
        if getattr(parallel, name) < 1:
            raise ConfigError(f"parallel.{name} must be at least 1")
    needed = parallel.pipeline * parallel.data
    if processes != needed:
        raise ConfigError(
            f"parallel.pipeline {parallel.pipeline} x parallel.data {parallel.data} needs {needed} processes, and there "
            f"{'is one' if processes == 1 else f'are {processes}'}: torchrun --nproc-per-node {needed} -m feedbackward train ..."
        )
    for name, off in _WHOLE.items():
        if getattr(config, name) != off:
            raise ConfigError(
                f"{name} is {getattr(config, name)}, which needs the whole network in one process: set it to "
                f"{'none' if off is None else off}, or leave out --parallel.pipeline"
            )
    if config.precision == "fp16":
        raise ConfigError("precision fp16 needs one loss scale for all processes: use bf16")
    for part in ("forward", "feedback"):
        if getattr(config, part).clip:
            raise ConfigError(
                f"{part}.clip is the norm of all gradients, and each process has a part of them: leave it at 0"
            )


def train_piped(
    config: TrainConfig, progress: Progress, interrupts: Interrupts, test: bool = True
) -> dict[str, Any]:
    """As `train`, on one of the processes of a pipeline; every one returns the result."""
    check_parallel(config, int(os.environ.get("WORLD_SIZE", "1")))
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        # torchrun starts again what failed, which is there to be gone on with
        config = replace(config, resume=True, overwrite=False)
    with start(config.parallel.timeout) as rank, ExitStack() as stack:
        folder, result = _claimed(config, rank, stack)
        if rank:
            progress = Progress(Console(file=stack.enter_context(open(os.devnull, "w"))))
        result = _together(result)
        if result is None:
            result = _train(config, folder, progress, interrupts, test)
    if result["status"] == "diverged":
        raise DivergenceError(result["message"])
    return result


def _claimed(
    config: TrainConfig, rank: int, stack: ExitStack
) -> tuple[RunFolder | None, dict[str, Any] | None]:
    """The folder and the result of a finished run, on rank 0; what is wrong with them is told to every rank."""
    folder, result, wrong = None, None, None
    if rank == 0:
        try:
            folder = RunFolder.claim(config)
            stack.callback(folder.close)
            result = folder.result_under(config)
        except FeedbackError as error:
            wrong = error
    wrong = _together(wrong)
    if wrong is not None:
        raise wrong
    return folder, result


def _together(value: Any) -> Any:
    """What rank 0 has, on every rank."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _train(
    config: TrainConfig,
    folder: RunFolder | None,
    progress: Progress,
    interrupts: Interrupts,
    test: bool,
) -> dict[str, Any]:
    if config.threads:
        torch.set_num_threads(config.threads)
    check_loggers(config)
    device = find_device(config.device)
    with interrupts.at_once():
        data = shared_data(config.data, config.task)
    run = PipedRun(config, data, device, folder is not None)
    saved = None
    if folder is not None:
        folder.add_environment(environment(device))
        saved = checkpoint.load(folder.checkpoint) if folder.checkpoint.exists() else None
    saved = _together(saved)
    if saved is not None:
        run.load(saved, Path(str(config.out)) / "checkpoint.safetensors")
        progress.say(f"resumed {config.out} in epoch {run.position.epoch + 1}")
    if folder is not None:  # only now: a resumed run has been found to have its own data
        folder.write_json(folder.data_file, data_identity(run.data))
        folder.keep_place(config)
    run.pipe.step = run.position.epoch * len(run.loader) + run.position.batch
    record: Any = NoRecord(run.position.rows)
    if folder is not None:
        record = Record(folder, run.position.rows, config)
    loop = PipedLoop(run, record, progress, cast(Interrupts, SharedInterrupts(run, interrupts)))
    result = loop.complete(folder or RunFolder(Path(str(config.out))), test)
    if folder is not None:
        folder.finish(result, config)
    return result


class PipedRun(Run):
    """One process's part of a run. `pipe`: its part of the network."""

    def __init__(
        self, config: TrainConfig, data: AnyData, device: torch.device, leads: bool
    ) -> None:
        super().__init__(config, data, device)
        parallel, self.leads = config.parallel, leads
        self._names = {
            part: [f"{part}.{name}" for name, p in self._part(part) if p.requires_grad]
            for part in ("model", "feedback")
        }
        rows = math.ceil(self.loader.batch_size / parallel.data / parallel.micro_batches)
        images, _ = next(self.loader.epoch(0))
        with self.precision():
            self.pipe = pipeline(
                self.learner,
                self.prepared(images[: max(2, rows)]),
                micro_batches=parallel.micro_batches,
                cut=parallel.cut,
                mesh=_mesh(config, device),
                timeout=parallel.timeout,
            )
        recipe, own = config.training(), dict(self.pipe.named_parameters())
        assert recipe.feedback is not None
        settings = {"model": recipe.forward, "feedback": recipe.feedback}
        self._own = {part: [n for n in self._names[part] if n in own] for part in self._names}
        self.weights = {
            part: Weights([own[n] for n in names], settings[part], self.epochs, len(self.loader))
            for part, names in self._own.items()
            if names
        }
        self._data_rank = dist.get_rank() // parallel.pipeline if dist.is_initialized() else 0
        self._sums = torch.zeros(2, dtype=torch.float64)
        self._loss: Loss | None = None
        self._steps = 0

    def _part(self, part: str) -> Any:
        return getattr(self.learner, part).named_parameters()

    def step(self, images: Tensor, labels: Tensor) -> float:
        """One update. Returns the mean loss of the batch before, which has arrived by now."""
        replicas = self.config.parallel.data
        own = images.tensor_split(replicas)[self._data_rank]
        mine = labels.tensor_split(replicas)[self._data_rank]
        # replicas count alike, and so must their images
        factor = len(own) * replicas / len(images)

        def loss_fn(output: Tensor, target: Tensor) -> Tensor:
            loss = self.task.loss(output, target)
            hits = self.task.hits(output, target)
            self._sums += torch.stack([loss.detach().double() * self.task.count(target), hits])
            return loss * factor

        self._trace()
        with self.precision():
            loss = self.pipe.backward(self.prepared(own), loss_fn, mine)
        for weights in self.weights.values():
            weights.step(self.scaler)
        position, before = self.position, self._loss
        self._loss = loss
        position.seen += self.task.count(labels)
        position.batch += 1
        return before.item() if before else math.nan

    def _trace(self) -> None:
        """After a first step for the caches, write what happens in three."""
        path = self.config.parallel.trace
        self._steps += 1
        if path and self._steps == 2:
            self.pipe.start_trace()
        if path and self._steps == 5:
            found = self.pipe.write_trace(path)
            if found and self.leads:
                plot_timeline(Path(path).with_suffix(".png"), found)

    def add_sums(self) -> None:
        """Put the losses and hits, which the last stages have counted, into every rank's position."""
        sums, self._sums = self._sums, torch.zeros(2, dtype=torch.float64)
        if dist.is_initialized():
            dist.all_reduce(sums)
        self.position.loss_sum += float(sums[0])
        self.position.correct += int(sums[1])

    def output(self, images: Tensor) -> Tensor:
        return self.pipe.evaluate(images)

    def model_state(self) -> dict[str, Tensor]:
        return _without("model.", self.pipe.gather_state() or {})

    def state(self) -> dict[str, Any]:
        """As of a run in one process, on rank 0; nothing of use on the others. Call it on every rank."""
        self.add_sums()
        whole = self.pipe.gather_state() or {}
        states = self._gathered({part: self._by_name(part) for part in self.weights})
        if not self.leads:
            return {}
        return {
            **super().state(),
            "model": _without("model.", whole),
            "feedback": _without("feedback.", whole),
            "weights": {
                part: self._whole(part, states) for part in self._names if self._names[part]
            },
        }

    def _by_name(self, part: str) -> dict[str, Any]:
        """The state of a part's optimizer, by the names of its parameters."""
        state = self.weights[part].state_dict()
        state["optimizer"] = dict(state["optimizer"])
        moments = state["optimizer"]["state"]
        state["optimizer"]["state"] = {
            name: moments[i] for i, name in enumerate(self._own[part]) if i in moments
        }
        return state

    def _gathered(self, own: dict[str, Any]) -> list[dict[str, Any]]:
        if not dist.is_initialized():
            return [own]
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, own)
        return found[: self.config.parallel.pipeline]

    def _whole(self, part: str, states: list[dict[str, Any]]) -> dict[str, Any]:
        """The state of a part's optimizer, as one process has it: by number."""
        found = [state[part] for state in states if part in state]
        moments = {k: v for state in found for k, v in state["optimizer"]["state"].items()}
        names = self._names[part]
        groups = [
            {**group, "params": list(range(len(names)))}
            for group in found[0]["optimizer"]["param_groups"]
        ]
        numbered = {i: moments[name] for i, name in enumerate(names) if name in moments}
        return {**found[0], "optimizer": {"state": numbered, "param_groups": groups}}

    def load_weights(self, state: dict[str, Any], where: Any) -> None:
        """This rank's part of model and feedback, and of their optimizers."""
        whole: dict[str, Tensor] = {}
        for part in ("model", "feedback"):
            expected = getattr(self.learner, part).state_dict()
            check_same_tensors(state[part], expected, f"the {part} in {where}")
            whole |= {f"{part}.{name}": tensor for name, tensor in state[part].items()}
        self.pipe.load_state_dict(whole)
        state["weights"] = {part: self._own_state(part, state["weights"]) for part in self.weights}

    def _own_state(self, part: str, states: Mapping[str, Any]) -> dict[str, Any]:
        numbers = {name: i for i, name in enumerate(self._names[part])}
        moments = states[part]["optimizer"]["state"]
        own = self._own[part]
        numbered = {i: moments[numbers[n]] for i, n in enumerate(own) if numbers[n] in moments}
        groups = [
            {**group, "params": list(range(len(own)))}
            for group in states[part]["optimizer"]["param_groups"]
        ]
        return {**states[part], "optimizer": {"state": numbered, "param_groups": groups}}


class PipedLoop(Loop):
    """The training loop of one process; only rank 0 writes."""

    run: PipedRun

    def enough(self) -> str | None:
        reason: str | None = _together(super().enough())
        return reason

    def end_epoch(self) -> None:
        self.run.add_sums()
        super().end_epoch()

    def write_checkpoint(self, state: dict[str, Any]) -> None:
        if self.run.leads:
            super().write_checkpoint(state)

    def write_model(self, state: Mapping[str, Tensor]) -> None:
        if self.run.leads:
            super().write_model(state)


class NoRecord:
    """In place of a `Record` on the processes that have no folder."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __enter__(self) -> NoRecord:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def add(self, kind: str, row: dict[str, Any]) -> None:
        """Count the row, as rank 0 does."""
        self.rows += 1


class SharedInterrupts:
    """A signal stops all processes after the same step, of which rank 0 tells the others."""

    def __init__(self, run: PipedRun, own: Interrupts) -> None:
        self.run, self.own = run, own

    def check(self) -> None:
        """Raise InterruptedRunError, on every rank between the same two steps."""
        if self.run.pipe.stopping:
            raise InterruptedRunError(self.run.pipe.stopping)
        if self.own.signum and self.run.leads:
            self.run.pipe.ask_to_stop(self.own.signum)


def _without(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}


def _mesh(config: TrainConfig, device: torch.device) -> Any:
    parallel = config.parallel
    if parallel.data == 1:
        return None
    from torch.distributed.device_mesh import init_device_mesh

    shape = parallel.data, parallel.pipeline
    return init_device_mesh(device.type, shape, mesh_dim_names=("data", "pipeline"))
