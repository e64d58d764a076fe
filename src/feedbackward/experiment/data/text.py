"""A text as sequences of characters, and the characters that follow them."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from feedbackward.errors import ConfigError, DataError
from feedbackward.experiment.config.data import DataConfig
from feedbackward.experiment.data.digest import digest_of, digests_of
from feedbackward.experiment.data.loader import Batches

# texts known by name, and where they lie below the data root
TEXTS = {"tiny-shakespeare": "small/tiny-shakespeare.txt"}


@dataclass(frozen=True)
class Sequences:
    """Tokens int64 [N, T], and for each the token that follows it, [N, T]."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, index: Tensor) -> Sequences:
        """The sequences at `index` (int64 [n]), copied."""
        return Sequences(self.inputs[index], self.targets[index])

    def digest(self) -> str:
        """SHA-256 over shape and tokens, in order."""
        return digest_of(self.inputs, self.targets)


@dataclass(frozen=True)
class TextData:
    """A text, split. `classes` is the vocabulary: the characters of the whole text, sorted."""

    name: str
    train: Sequences
    validation: Sequences
    test: Sequences
    classes: list[str]
    note: str = ""

    @property
    def shape(self) -> tuple[int]:
        """(T,) of one sequence."""
        return (self.train.inputs.shape[1],)

    @property
    def num_classes(self) -> int:
        """The size of the vocabulary."""
        return len(self.classes)

    @functools.cached_property
    def digests(self) -> dict[str, str]:
        """SHA-256 over the tokens of each split, in order."""
        return digests_of(self)

    @property
    def form(self) -> dict[str, Any]:
        """What a model needs to know of its inputs."""
        return {"context": self.shape[0], "input": "the numbers of characters in classes"}


class SequenceLoader(Batches):
    """Batches of sequences: int64 [n, T] and what follows each token, [n, T]."""

    examples: Sequences

    def rows(self, index: Tensor, epoch: int, batch: int) -> tuple[Tensor, Tensor]:
        chosen = self.examples.take(index)
        return chosen.inputs.to(self.device), chosen.targets.to(self.device)


def load_text(config: DataConfig) -> TextData:
    """Read a text file: 90 % of it to train on, then 5 % held out, then 5 % to test on, in the order of the text.

    Each part is cut into sequences of `config.context` characters, each with the next character as its target; what is left
    over at the end of a part is dropped. Raises DataError for a file that is missing, no UTF-8 or too short, and
    ConfigError for an option that is not of texts.
    """
    _check(config)
    path = find_text(config)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the text {path}: {' '.join(str(error).split())}") from error
    classes = sorted(set(text))
    place = {character: i for i, character in enumerate(classes)}
    tokens = torch.from_numpy(np.fromiter((place[c] for c in text), np.int64, len(text)))
    ends = [round(len(tokens) * share) for share in (0.0, 0.9, 0.95, 1.0)]
    limits = (config.train_limit, config.validation, config.test_limit)
    parts = (tokens[a:b] for a, b in itertools.pairwise(ends))
    splits = [
        _windows(part, config.context)[:limit] for part, limit in zip(parts, limits, strict=True)
    ]
    if any(len(split) < 2 for split in splits):
        least = 20 * (2 * config.context + 1)
        raise DataError(
            f"the text {path} has {len(text):,} characters, which gives a split less than 2 sequences of {config.context}: take "
            f"one of at least {least:,}, or a shorter data.context."
        )
    train, validation, test = (
        Sequences(split[:, :-1].contiguous(), split[:, 1:].contiguous()) for split in splits
    )
    return TextData(path.stem, train, validation, test, classes)


def fingerprint_text(config: DataConfig) -> str:
    """A digest that is another as soon as the file has changed. Raises as `load_text` does."""
    try:
        return hashlib.sha256(find_text(config).read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"cannot read the text of '{config.name}': {error}") from error


def find_text(config: DataConfig) -> Path:
    """The file of a text: known by name below `config.root`, or a path. Raises ConfigError and DataError."""
    name, root = config.name, config.root
    if name in TEXTS and root is None:
        raise ConfigError(
            f"the text '{name}' is read from a folder: give it with --data-root, with the file at {TEXTS[name]} in it."
        )
    path = Path(root or ".").expanduser() / TEXTS.get(name, name)
    if not path.is_file():
        raise DataError(
            f"There is no text file {path}: a language model needs one as data.name (known by name: {', '.join(TEXTS)})."
        )
    return path


def _windows(tokens: Tensor, context: int) -> Tensor:
    """[n, context + 1]: each begins where the one before ends, so that every token but the first is a target once."""
    if len(tokens) <= context:
        return tokens.new_empty(0, context + 1)
    return tokens.unfold(0, context + 1, context)


def _check(config: DataConfig) -> None:
    if config.context < 1:
        raise ConfigError(f"data.context is {config.context}: it must be at least 1")
    given: Iterator[str] = (
        name
        for name, default in (("classes", None), ("size", None), ("augment", "none"))
        if getattr(config, name) != default
    )
    for name in given:
        raise ConfigError(f"data.{name} is for images: leave it out for a text")
