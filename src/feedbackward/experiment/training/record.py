"""The record of a run: metrics.jsonl, one line per epoch and per probe, and the same numbers for experiment trackers."""

from __future__ import annotations

import json
import warnings
from types import TracebackType
from typing import Any

from feedbackward.errors import CheckpointError
from feedbackward.experiment.config.files import flat, to_dict
from feedbackward.experiment.config.schema import TrainConfig
from feedbackward.experiment.training.loggers import Logger, Start, find_logger
from feedbackward.experiment.training.runfolder import RunFolder


class Record:
    """Appends rows to a run's metrics.

    Rows that were written after the checkpoint a run resumes from are dropped: it writes them again.
    """

    def __init__(self, folder: RunFolder, rows: int, config: TrainConfig) -> None:
        """``rows``: how many rows the checkpoint knows of. Raises ConfigError for a logger that is not there."""
        self.folder, self._config = folder, config
        kept = folder.rows()[:rows]
        self.rows = len(kept)
        if self.rows < rows:
            warnings.warn(
                f"{folder.metrics} has lost {rows - self.rows} of the {rows} rows that were in it at the last checkpoint: "
                "the run goes on without them",
                RuntimeWarning,
                stacklevel=2,
            )
        folder.write(folder.metrics, "".join(json.dumps(row) + "\n" for row in kept))
        self._epoch = max((row["epoch"] for row in kept), default=0)
        self._made = {name: find_logger(name) for name in logger_names(config)}
        self._loggers: list[Logger] = []

    def __enter__(self) -> Record:
        known, epoch = self.folder.tracked(), self._epoch if self.rows else None
        config = flat(to_dict(self._config))
        for name, make in self._made.items():
            logger = make(Start(self.folder.path, config, epoch, known.get(name)))
            self._loggers.append(logger)
            if getattr(logger, "id", None):
                known[name] = logger.id
        if known:
            self.folder.write_json(self.folder.trackers_file, known)
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for logger in self._loggers:
            logger.close()
        self._loggers.clear()

    def add(self, kind: str, row: dict[str, Any]) -> None:
        """Append ``{"kind": kind, **row}``; ``row["epoch"]`` is the number of finished epochs."""
        try:
            with self.folder.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": kind, **row}) + "\n")
        except OSError as error:
            raise CheckpointError(
                f"could not write {self.folder.metrics} ({error}): free some space, then go on with --resume"
            ) from error
        self.rows += 1
        for logger in self._loggers:
            logger.log(_scalars(kind, row), row["epoch"])


def check_loggers(config: TrainConfig) -> None:
    """Raise ConfigError for a logger that is not there: before the data are read."""
    for name in logger_names(config):
        find_logger(name)


def logger_names(config: TrainConfig) -> list[str]:
    """The loggers that a config asks for, each once."""
    asked = ["tensorboard" if config.tensorboard else None, config.logger]
    return list(dict.fromkeys(name for name in asked if name))


def _scalars(kind: str, row: dict[str, Any]) -> dict[str, float]:
    """An epoch's numbers as they are, a probe's angles per site and per parameter."""
    if kind == "epoch":
        return {name: v for name, v in row.items() if name != "epoch" and v is not None}
    return {
        f"{group}/{name}/angle": measures["angle"]
        for group in ("sites", "parameters")
        for name, measures in row[group].items()
        if measures["angle"] is not None
    }
