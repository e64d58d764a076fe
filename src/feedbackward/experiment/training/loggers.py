"""Experiment trackers that get a run's metrics, each by its own client. `metrics.jsonl` is written in any case."""

from __future__ import annotations

import importlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feedbackward.errors import ConfigError
from feedbackward.experiment.imported import imported


@dataclass(frozen=True)
class Start:
    """What a logger is told of its run.

    folder: the run's. config: the resolved config, flat (`{"forward.lr": 0.1}`).
    epoch: the finished epochs that the tracker has already, if the run is resumed; otherwise None.
    id: what the tracker called the run before it was resumed, or None.
    """

    folder: Path
    config: Mapping[str, Any]
    epoch: int | None = None
    id: str | None = None


class Logger(ABC):
    """Sends a run's numbers to a tracker. It is made by `Class(start)` when training begins or goes on.

    id: what the tracker calls the run. It is kept in the run's folder, and given back in `Start` when the run is resumed.
    """

    id: str | None = None

    @abstractmethod
    def log(self, values: Mapping[str, float], epoch: int) -> None:
        """The numbers after so many finished epochs."""

    def close(self) -> None:
        """The run ends or is interrupted."""
        return


class TensorBoard(Logger):
    """Event files in the run's folder `tensorboard`."""

    def __init__(self, start: Start) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        purge = None if start.epoch is None else start.epoch + 1
        self._writer = SummaryWriter(str(start.folder / "tensorboard"), purge_step=purge)

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, epoch)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB(Logger):
    """Weights & Biases. Its own variables apply: WANDB_MODE=offline, WANDB_PROJECT, WANDB_ENTITY."""

    def __init__(self, start: Start) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "feedbackward"),
            name=start.folder.name,
            dir=str(start.folder),
            config=dict(start.config),
            id=start.id,
            resume="allow",
        )
        self.id = self._run.id

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        self._run.log(dict(values), step=epoch)

    def close(self) -> None:
        self._run.finish()


class MLflow(Logger):
    """MLflow. Its own variables apply: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME."""

    def __init__(self, start: Start) -> None:
        import mlflow

        self._mlflow = mlflow
        self.id = mlflow.start_run(run_id=start.id, run_name=start.folder.name).info.run_id
        if start.id is None:
            mlflow.log_params(dict(start.config))

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        # names of layers may have signs that it refuses
        named = {re.sub(r"[^\w./ -]", "_", name): value for name, value in values.items()}
        self._mlflow.log_metrics(named, step=epoch)

    def close(self) -> None:
        self._mlflow.end_run()


LOGGERS = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


def find_logger(name: str) -> Any:
    """The class of this name, or `package.module:Class`. Raises ConfigError for others, and where a package is missing."""
    if ":" not in name and name not in LOGGERS:
        raise ConfigError(
            f"unknown logger {name!r}: known are {', '.join(LOGGERS)}; or package.module:Class for your own"
        )
    if ":" in name:
        return imported(name, "logger")
    package = {"tensorboard": "torch.utils.tensorboard"}.get(name, name)
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"the logger {name!r} could not be imported ({error}): install it with `pip install {name}`"
        ) from error
    return LOGGERS[name]
