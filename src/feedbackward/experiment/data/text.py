"""A text as sequences of characters, and the characters that follow them."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from feedbackward.errors import ConfigError, DataError
from feedbackward.experiment.config.data import DataConfig
from feedbackward.experiment.data.named import file_digest, find_file, refuse_options
from feedbackward.experiment.data.splits import Pairs, SplitData

# texts known by name, and where they lie below the data root
TEXTS = {"tiny-shakespeare": "small/tiny-shakespeare.txt"}


def load_text(config: DataConfig) -> SplitData:
    """Read a text file: 90 % of it to train on, then 5 % held out, then 5 % to test on, in the order of the text.

    Each part is cut into sequences of `config.context` characters, each with the next character as its target; what is left
    over at the end of a part is dropped. Raises DataError for a file that is missing, no UTF-8 or too short, and
    ConfigError for an option that is not of texts.
    """
    refuse_options(config, "a text", "classes", "size", "augment")
    context = 64 if config.context is None else config.context
    if context < 1:
        raise ConfigError(f"data.context is {context}: it must be at least 1")
    path = find_file(config, TEXTS, "text")
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
    splits = [_windows(part, context)[:limit] for part, limit in zip(parts, limits, strict=True)]
    if any(len(split) < 2 for split in splits):
        least = 20 * (2 * context + 1)
        raise DataError(
            f"the text {path} has {len(text):,} characters, which gives a split less than 2 sequences of {context}: take "
            f"one of at least {least:,}, or a shorter data.context."
        )
    train, validation, test = (
        Pairs(split[:, :-1].contiguous(), split[:, 1:].contiguous()) for split in splits
    )
    form = {"context": context, "input": "the numbers of characters in classes"}
    return SplitData(path.stem, train, validation, test, classes, (context,), form)


def fingerprint_text(config: DataConfig) -> str:
    """A digest that is another as soon as the file has changed. Raises as `load_text` does."""
    return file_digest(find_file(config, TEXTS, "text"))


def _windows(tokens: Tensor, context: int) -> Tensor:
    """[n, context + 1]: each begins where the one before ends, so that every token but the first is a target once."""
    if len(tokens) <= context:
        return tokens.new_empty(0, context + 1)
    return tokens.unfold(0, context + 1, context)
