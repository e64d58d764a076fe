"""The record of a run: metrics.jsonl, one line per epoch and per probe, and scalars for TensorBoard."""

from __future__ import annotations

import json
import warnings
from types import TracebackType
from typing import TYPE_CHECKING, Any

from feedbackward.errors import CheckpointError
from feedbackward.experiment.training.runfolder import RunFolder

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Record:
    """Appends rows to a run's metrics.

    Rows that were written after the checkpoint a run resumes from are dropped: it writes them again.
    """

    def __init__(self, folder: RunFolder, rows: int, tensorboard: bool) -> None:
        """``rows``: how many rows the checkpoint knows of."""
        self.folder, self.tensorboard = folder, tensorboard
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
        self._writer: SummaryWriter | None = None

    def __enter__(self) -> Record:
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            purge = self._epoch + 1 if self.rows else None
            self._writer = SummaryWriter(str(self.folder.tensorboard), purge_step=purge)
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer:
            self._writer.close()
        self._writer = None

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
        if self._writer:
            for name, value in _scalars(kind, row):
                self._writer.add_scalar(name, value, row["epoch"])
            self._writer.flush()


def _scalars(kind: str, row: dict[str, Any]) -> list[tuple[str, float]]:
    """An epoch's numbers as they are, a probe's angles per site and per parameter."""
    if kind == "epoch":
        return [
            (name, value) for name, value in row.items() if name != "epoch" and value is not None
        ]
    return [
        (f"{group}/{name}/angle", measures["angle"])
        for group in ("sites", "parameters")
        for name, measures in row[group].items()
        if measures["angle"] is not None
    ]
