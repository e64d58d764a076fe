"""The folder of one run: what it holds, and who may write to it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from feedbackward.errors import ConfigError, FeedbackError
from feedbackward.experiment.config.files import from_dict, read_yaml, write_yaml
from feedbackward.experiment.config.schema import TrainConfig
from feedbackward.experiment.training.checkpoint import replace_file
from feedbackward.experiment.training.identity import (
    changed_settings,
    check_same_settings,
    tied_settings,
)

try:
    import fcntl
except ImportError:  # not on Windows, where two processes may then share a folder
    fcntl = None  # type: ignore[assignment]

OWN = (
    "config.yaml",
    "environment.json",
    "data.json",
    "checkpoint.safetensors",
    "metrics.jsonl",
    "model.safetensors",
    "trackers.json",
    "README.md",
)

# in result.json beside what the run came to
_SETTINGS = "settings"


@contextlib.contextmanager
def new_folder(config: TrainConfig) -> Iterator[None]:
    """If the run within is refused before it has saved anything, the folder that it made for itself is removed."""
    folder = RunFolder(Path(str(config.out)))
    made = not folder.path.exists() and os.environ.get("RANK", "0") == "0"
    try:
        yield
    except FeedbackError:
        if made and not (folder.checkpoint.exists() or folder.result_file.exists()):
            with contextlib.suppress(FeedbackError, OSError):
                folder.lock()
                folder.clear()
                (folder.path / ".lock").unlink()
                folder.close()
                folder.path.rmdir()
        raise


class RunFolder:
    """Paths and small files of a run. Made by `claim` (to train) or `existing` (to read)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.environment_file = path / "environment.json"
        self.data_file = path / "data.json"
        self.checkpoint = path / "checkpoint.safetensors"
        self.metrics = path / "metrics.jsonl"
        self.model = path / "model.safetensors"
        self.result_file = path / "result.json"
        self.tensorboard = path / "tensorboard"
        self.trackers_file = path / "trackers.json"
        self.card = path / "README.md"
        self._lock: IO[str] | None = None

    @classmethod
    def existing(cls, path: str | Path) -> RunFolder:
        """The folder of an earlier run. Raises ConfigError if ``path`` is none."""
        folder = cls(Path(path))
        if not folder.config_file.is_file():
            raise ConfigError(f"{path} is not the folder of a run: it has no config.yaml")
        return folder

    @classmethod
    def claim(cls, config: TrainConfig) -> RunFolder:
        """The folder ``config.out``, ready to train in, with the config written and the folder locked.

        Raises:
            ConfigError: it cannot be written, is in use, holds something else, a finished run, or a run of
                another config.
        """
        assert config.out is not None  # a resolved config has one
        folder = cls(Path(config.out))
        if config.resume and config.overwrite:
            raise ConfigError(
                "--resume continues a run and --overwrite replaces it: give one of them"
            )
        try:
            folder.check_free(config)
            folder.path.mkdir(parents=True, exist_ok=True)
            folder.lock()
            # what failed before its first checkpoint may have had another config
            if config.overwrite or folder.has_nothing():
                folder.clear()
            if not folder.config_file.exists():
                folder.write(folder.config_file, write_yaml(config))
        except OSError as error:
            raise ConfigError(
                f"the run folder {folder.path} cannot be written ({error.strerror}): choose one with --out"
            ) from error
        return folder

    def config(self) -> TrainConfig:
        """The resolved config that the run was started with."""
        return from_dict(TrainConfig, read_yaml(self.config_file), str(self.config_file))

    def result(self) -> dict[str, Any] | None:
        """What the finished run came to; None while it is not finished."""
        return _without_settings(self._json(self.result_file))

    def result_under(self, config: TrainConfig) -> dict[str, Any] | None:
        """The result. Raises CheckpointError where the finished run had other settings than these."""
        found = self._json(self.result_file)
        # results of before do not have them
        if found is not None and _SETTINGS in found:
            check_same_settings(found[_SETTINGS], config, self.result_file)
        return _without_settings(found)

    def finish(self, result: dict[str, Any], config: TrainConfig) -> None:
        """Write the result, and the settings that made it."""
        self.write_json(self.result_file, {**result, _SETTINGS: tied_settings(config)})

    def data(self) -> dict[str, Any] | None:
        """The identity of the data that the run was started with; None where it is not known."""
        return self._json(self.data_file)

    def tracked(self) -> dict[str, Any]:
        """What each experiment tracker calls the run, by the logger's name."""
        return self._json(self.trackers_file) or {}

    def _json(self, file: Path) -> dict[str, Any] | None:
        if not file.is_file():
            return None
        try:
            return dict(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"{file} is damaged ({error}): remove it and resume the run"
            ) from error

    def write(self, path: Path, text: str) -> None:
        """Write a small text file atomically."""
        replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def write_json(self, path: Path, values: dict[str, Any]) -> None:
        """Write a small JSON file atomically."""
        self.write(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")

    def add_environment(self, values: dict[str, Any]) -> None:
        """Record what a run, or its continuation, is computed with: a list, one entry per start."""
        file, entries = self.environment_file, []
        if file.is_file():
            with contextlib.suppress(
                ValueError
            ):  # half written, by hand perhaps: not worth failing for
                entries = list(json.loads(file.read_text(encoding="utf-8")))
        self.write(file, json.dumps([*entries, values], indent=1, ensure_ascii=False) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """The metrics written so far; a last line cut off by a crash is left out."""
        if not self.metrics.exists():
            return []
        rows = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
        return rows

    def close(self) -> None:
        """Let others use the folder."""
        if self._lock:
            self._lock.close()
        self._lock = None

    def check_free(self, config: TrainConfig) -> None:
        """Raise ConfigError unless the run may be trained here: in an empty folder, or, as it asks, resumed or anew."""
        if not self.path.exists() or (self.path.is_dir() and not any(self._contents())):
            return
        if not self.config_file.is_file():
            raise ConfigError(
                f"{self.path} exists and is not the folder of a run: choose another with --out, or empty it"
            )
        if config.overwrite or self.has_nothing():
            return
        if not config.resume:
            state, ways = (
                ("a finished run", "")
                if self.result()
                else ("an unfinished run", "--resume to go on, ")
            )
            raise ConfigError(
                f"{self.path} holds {state}: give {ways}--overwrite to replace it, or another --out"
            )
        if changed := changed_settings(self.config(), config):
            raise ConfigError(
                f"the run in {self.path} cannot be resumed with another config ({'; '.join(changed)}): "
                f"resume it as it was, with --config {self.config_file} --resume, or replace it with --overwrite, "
                "or choose another --out"
            )

    def has_nothing(self) -> bool:
        """Whether there is neither a checkpoint nor a result that could be lost."""
        return not self.checkpoint.exists() and self.result() is None

    def keep_place(self, config: TrainConfig) -> None:
        """Note where the data lie now, which were found to be those of the run."""
        kept = self.config()
        data = replace(kept.data, name=config.data.name, root=config.data.root)
        if data != kept.data:
            self.write(self.config_file, write_yaml(replace(kept, data=data)))

    def _contents(self) -> list[str]:
        return [name for name in os.listdir(self.path) if name != ".lock"]

    def lock(self) -> None:
        """Keep other processes out, until `close` or until this process ends, however it ends."""
        self._lock = open(self.path / ".lock", "w")  # noqa: SIM115 (stays open)
        if fcntl is None:
            return
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"another process is training in {self.path}: wait for it, or choose another with --out"
            ) from error

    def clear(self) -> None:
        """Remove what a run wrote, and nothing else."""
        files = [self.path / name for name in (*OWN, "result.json")]
        events = (
            sorted(self.tensorboard.glob("events.out.tfevents.*"))
            if self.tensorboard.is_dir()
            else []
        )
        for file in (*files, *events):
            file.unlink(missing_ok=True)


def _without_settings(found: dict[str, Any] | None) -> dict[str, Any] | None:
    return found and {key: value for key, value in found.items() if key != _SETTINGS}
