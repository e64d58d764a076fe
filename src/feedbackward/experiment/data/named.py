"""Files of data that are known by name or given by path, for tasks whose data is one file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from feedbackward.errors import ConfigError, DataError
from feedbackward.experiment.config.data import DataConfig

# what an option of data is for, where it is not for all
_MEANT_FOR = {"context": "for texts, sentences and music", "tokens": "for texts"}


def find_place(config: DataConfig, known: Mapping[str, str], what: str) -> Path:
    """Where the data lie: known by name below `config.root`, or a path. Raises ConfigError for a name without a root.

    `known`: where those of each name lie. `what`: what they are, in one word.
    """
    name, root = config.name, config.root
    if name in known and root is None:
        raise ConfigError(
            f"the {what} '{name}' is read from a folder: give it with --data-root, with {known[name]} in it."
        )
    return Path(root or ".").expanduser() / known.get(name, name)


def find_file(config: DataConfig, known: Mapping[str, str], what: str) -> Path:
    """The file of the data, as `find_place`. Raises DataError where there is none."""
    path = find_place(config, known, what)
    if not path.is_file():
        raise DataError(
            f"There is no {what} file {path}: this task needs one as data.name (known by name: {', '.join(known)})."
        )
    return path


def file_digest(path: Path) -> str:
    """A digest of the file's bytes. Raises DataError where it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from error


def read_arrays(path: Path, needed: tuple[str, ...]) -> dict[str, Any]:
    """The arrays of an .npz file. Raises DataError where it cannot be read, or lacks one that is needed."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise DataError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    absent = [name for name in needed if name not in arrays]
    if absent:
        raise DataError(
            f"{path} has no array '{absent[0]}': it needs {', '.join(needed)}, and has {', '.join(arrays)}"
        )
    return arrays


def read_columns(path: Path, *names: str) -> Any:
    """A table with these columns of a Parquet file. Raises DataError where it cannot be read, or lacks one."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path, columns=list(names))
        return table.select(names)
    except (OSError, KeyError, pyarrow.ArrowException) as error:
        raise DataError(f"cannot read {path}: {' '.join(str(error).split())}") from error


def refuse_options(config: DataConfig, what: str, *names: str) -> None:
    """Refuse options that data of this kind does not have."""
    defaults = {field.name: field.default for field in fields(DataConfig)}
    for name in names:
        if getattr(config, name) != defaults[name]:
            meant = _MEANT_FOR.get(name, "for images")
            raise ConfigError(f"data.{name} is {meant}: leave it out for {what}")
