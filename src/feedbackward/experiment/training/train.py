"""Train one network by one rule: the loop, its checkpoints and its record."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from feedbackward.errors import DivergenceError
from feedbackward.experiment.config.schema import TrainConfig
from feedbackward.experiment.training import checkpoint
from feedbackward.experiment.training.building import find_device, import_from_here, shared_data
from feedbackward.experiment.training.checkpoint import replace_file
from feedbackward.experiment.training.environment import environment
from feedbackward.experiment.training.identity import check_same_data, data_identity
from feedbackward.experiment.training.interrupts import InterruptedRunError, Interrupts
from feedbackward.experiment.training.progress import Progress
from feedbackward.experiment.training.record import Record, check_loggers
from feedbackward.experiment.training.run import Run
from feedbackward.experiment.training.runfolder import RunFolder

REPLACE = "replace the run with --overwrite, or choose another --out"
REPLACE_ALL = "replace the whole comparison with --overwrite"


def train(
    config: TrainConfig,
    progress: Progress,
    interrupts: Interrupts,
    test: bool = True,
    beside: Sequence[RunFolder] = (),
) -> dict[str, Any]:
    """Train as configured, in the run's folder, and return its result (as in result.json).

    A run that is finished already is not touched; its result is returned, if the data are still those.

    Args:
        config: it is resolved first.
        progress: told every step and finished epoch; entered already.
        interrupts: asked after every step; entered already.
        test: evaluate on the test images at the end; a trial that only serves a choice must not.
        beside: finished runs that this one is compared with: they must have had the same data.

    Raises:
        InterruptedRunError: a signal came; the state is saved.
        DivergenceError: the loss became NaN or infinite; the last good checkpoint is kept.
        FeedbackError: anything else that is wrong with the config, the data or the folder.
    """
    config = config.resolved()
    import_from_here()
    if config.parallel.pipeline or "WORLD_SIZE" in os.environ:
        from feedbackward.experiment.training.piped import train_piped

        return train_piped(config, progress, interrupts, test)
    folder = RunFolder.claim(config)
    try:
        for other in beside:
            check_same_data(
                other.data(), shared_data(config.data, config.task), other.path, REPLACE_ALL
            )
        result = folder.result_under(config)
        if result is None:
            result = _train(config, folder, progress, interrupts, test)
        elif (found := folder.data()) is not None:
            check_same_data(found, shared_data(config.data, config.task), folder.path, REPLACE)
            folder.keep_place(config)
    finally:
        folder.close()
    if result["status"] == "diverged":
        raise DivergenceError(result["message"])
    return result


def _train(
    config: TrainConfig, folder: RunFolder, progress: Progress, interrupts: Interrupts, test: bool
) -> dict[str, Any]:
    if config.threads:
        torch.set_num_threads(config.threads)
    check_loggers(config)
    device = find_device(config.device)
    folder.add_environment(environment(device))
    with interrupts.at_once():
        data = shared_data(config.data, config.task)
    run = Run(config, data, device)
    if folder.checkpoint.exists():
        run.load(checkpoint.load(folder.checkpoint), folder.checkpoint)
        progress.say(
            f"resumed {folder.path} in epoch {run.position.epoch + 1}, batch {run.position.batch + 1}"
        )
    folder.write_json(folder.data_file, data_identity(run.data))
    folder.keep_place(config)
    loop = Loop(run, Record(folder, run.position.rows, config), progress, interrupts)
    result = loop.complete(folder, test)
    folder.finish(result, config)
    return result


class Loop:
    """The training loop of one run."""

    def __init__(
        self, run: Run, record: Record, progress: Progress, interrupts: Interrupts
    ) -> None:
        self.run, self.record, self.progress, self.interrupts = run, record, progress, interrupts
        self.since = time.perf_counter()

    def complete(self, folder: RunFolder, test: bool) -> dict[str, Any]:
        """From the run's position to its end; returns the result, also of a run that diverges."""
        run, position = self.run, self.run.position
        batches = len(run.loader)
        self.progress.begin_run(run.epochs * batches, position.epoch * batches + position.batch)
        with self.record:
            try:
                pruned = self.epochs()
                return _result(run, "pruned", pruned) if pruned else self.finish(test)
            except InterruptedRunError:
                self.save()
                raise
            except DivergenceError as error:
                return failed_result(run, folder, error)
            finally:
                self.progress.end_run()

    def epochs(self) -> str | None:
        """From the run's position to the end, with a checkpoint after every epoch; why it ends early, if it does."""
        position = self.run.position
        self.probe_if_due()
        while position.epoch < self.run.epochs:
            if reason := self.enough():
                return reason
            self.steps()
            self.end_epoch()
            self.save()
            self.probe_if_due()
        return None

    def enough(self) -> str | None:
        """Why the run should not go on after the epochs that it has."""
        return self.progress.enough()

    def steps(self) -> None:
        """The rest of the running epoch."""
        run, position = self.run, self.run.position
        label, unit = f"epoch {position.epoch + 1}/{run.epochs}", run.task.kind.unit
        started, carried, seen = time.perf_counter(), position.epoch_seconds, 0
        for images, labels in run.loader.epoch(position.epoch, start=position.batch):
            self.interrupts.check()
            loss = run.step(images, labels)
            seen += run.task.count(labels)
            spent = time.perf_counter() - started
            position.epoch_seconds = carried + spent
            self.progress.step(label, f"loss {loss:.3f}, {seen / spent:,.0f} {unit}/s")

    def end_epoch(self) -> None:
        """Evaluate on the held-out data, record the epoch, and move to the next."""
        run, position = self.run, self.run.position
        trained = run.task.measures(
            position.loss_sum / position.seen, 100 * position.correct / position.seen
        )
        held_out = run.evaluate(run.data.validation, self.interrupts.check)
        kind = run.task.kind
        row = {
            "epoch": position.epoch + 1,
            **{f"train_{name}": value for name, value in trained.items()},
            **{f"validation_{name}": value for name, value in held_out.items()},
            "seconds": position.epoch_seconds,
            f"{kind.unit}_per_second": position.seen / max(position.epoch_seconds, 1e-9),
            **{f"{part}_lr": weights.lr for part, weights in run.weights.items()},
        }
        self.record.add("epoch", row)
        measure, speed = kind.measure, row[f"{kind.unit}_per_second"]
        self.progress.say(
            f"epoch {row['epoch']}/{run.epochs}: train loss {row['train_loss']:.3f}, train "
            f"{measure.in_words(trained[measure.key])}, held out {measure.in_words(held_out[measure.key])}, "
            f"{speed:,.0f} {kind.unit}/s"
        )
        chance = run.task.guess(run.data)
        if row["train_loss"] > 10 * chance:
            self.progress.say(
                f"the loss is far above that of guessing ({chance:.2f}): training diverges without becoming NaN; lower the rates"
            )
        position.next_epoch()

    def probe_if_due(self) -> None:
        """The alignment with backprop, into the record, unless this epoch has it already."""
        position, every = self.run.position, self.run.config.probe_every
        due = every and (position.epoch % every == 0 or position.epoch == self.run.epochs)
        if due and position.batch == 0 and position.probed < position.epoch:
            self.interrupts.check()
            self.record.add("probe", {"epoch": position.epoch, **self.run.probe().as_dict()})
            position.probed = position.epoch

    def save(self) -> None:
        """A checkpoint of this very moment."""
        now = time.perf_counter()
        self.run.position.seconds += now - self.since
        self.run.position.rows = self.record.rows
        self.since = now
        self.write_checkpoint(self.run.state())

    def write_checkpoint(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint of the run's folder."""
        checkpoint.save(self.record.folder.checkpoint, state)

    def finish(self, test: bool) -> dict[str, Any]:
        """Export the weights, and evaluate on the test data: once, and after every choice was made."""
        run = self.run
        self.write_model(run.model_state())
        if not test:
            return _result(run, "done")
        found = run.evaluate(run.data.test, self.interrupts.check)
        return _result(run, "done") | {f"test_{name}": value for name, value in found.items()}

    def write_model(self, state: Mapping[str, Tensor]) -> None:
        """The network's weights in a file of their own."""
        tensors = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in state.items()
        }
        replace_file(
            self.record.folder.model, lambda path: save_file(tensors, path, {"format": "pt"})
        )


def _result(run: Run, status: str, message: str = "") -> dict[str, Any]:
    return {
        "status": status,
        "message": message,
        "rule": run.config.rule,
        "seed": run.config.seed,
        "seconds": run.position.seconds,
        "feedback_bytes": run.learner.feedback_bytes,
        "calibrations": run.calibrations,
        "test_accuracy": None,
    }


def failed_result(run: Run, folder: RunFolder, error: DivergenceError) -> dict[str, Any]:
    """The result of a run that diverged."""
    kept = f"the last good checkpoint is {folder.checkpoint}" if folder.checkpoint.exists() else ""
    return _result(run, "diverged", "; ".join(filter(None, [str(error), kept])))
