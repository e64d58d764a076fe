"""A text as sequences of characters or byte-pair tokens, and the ones that follow them."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from feedbackward.errors import ConfigError, DataError
from feedbackward.experiment.config.data import DataConfig
from feedbackward.experiment.data.named import file_digest, find_file, read_columns, refuse_options
from feedbackward.experiment.data.splits import Pairs, SplitData

# texts known by name, and where they lie below the data root
TEXTS = {
    "tiny-shakespeare": "small/tiny-shakespeare.txt",
    # beside this file lie those of the other parts
    "wikitext-2": "Salesforce/wikitext/wikitext-2-v1/test-00000-of-00001.parquet",
}


def load_text(config: DataConfig) -> SplitData:
    """A text in three parts, each cut into sequences of `config.context` tokens, with the token after each as its target.

    Of a file 90 % are to train on, then 5 % held out, then 5 % to test on, in the order of the text; a text of the hub has a split of
    its own. Tokens are characters, or `config.tokens` byte-pair tokens that are learned on what is trained on. What is left over at
    the end of a part is dropped. Raises DataError for a file that is missing, no UTF-8 or too short, and ConfigError for an
    option that is not of texts.
    """
    refuse_options(config, "a text", "classes", "size", "augment")
    context = 64 if config.context is None else config.context
    if context < 1:
        raise ConfigError(f"data.context is {context}: it must be at least 1")
    path = find_file(config, TEXTS, "text")
    note, parts = _hub_parts(path) if path.suffix == ".parquet" else ("", _parts(path))
    if config.tokens is None:
        unit, (classes, numbers) = "characters", _as_characters(parts)
    else:
        unit, (classes, numbers) = "byte-pair tokens", _as_pairs(parts, config.tokens)
    limits = (config.train_limit, config.validation, config.test_limit)
    splits = [_windows(part, context)[:limit] for part, limit in zip(numbers, limits, strict=True)]
    if any(len(split) < 2 for split in splits):
        least = 20 * (2 * context + 1)
        raise DataError(
            f"the text {path} has {sum(map(len, numbers)):,} {unit}, which gives a split less than 2 sequences of {context}: take "
            f"one of at least {least:,}, or a shorter data.context."
        )
    train, validation, test = (
        Pairs(split[:, :-1].contiguous(), split[:, 1:].contiguous()) for split in splits
    )
    form = {"context": context, "input": f"the numbers of {unit} in classes"}
    name = config.name if config.name in TEXTS else path.stem
    return SplitData(name, train, validation, test, classes, (context,), form, note)


def fingerprint_text(config: DataConfig) -> str:
    """A digest that is another as soon as a file has changed. Raises as `load_text` does."""
    path = find_file(config, TEXTS, "text")
    files = sorted(path.parent.glob("*.parquet")) if path.suffix == ".parquet" else [path]
    return "-".join(map(file_digest, files))


def _parts(path: Path) -> list[str]:
    """A file in three parts."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the text {path}: {' '.join(str(error).split())}") from error
    ends = [round(len(text) * share) for share in (0.0, 0.9, 0.95, 1.0)]
    return [text[a:b] for a, b in itertools.pairwise(ends)]


def _hub_parts(path: Path) -> tuple[str, list[str]]:
    """A note, and the parts that lie beside each other in the hub's layout.

    Without a training part, nine tenths of the one for validation are trained on.
    """
    found: dict[str, str] = {}
    for file in sorted(path.parent.glob("*.parquet")):
        lines = read_columns(file, "text")["text"].to_pylist()
        name = file.name.partition("-")[0]
        found[name] = found.get(name, "") + "".join(line or "" for line in lines)
    absent = [name for name in ("validation", "test") if not found.get(name)]
    if absent:
        raise DataError(
            f"{path.parent} has no text for {absent[0]}: it needs {absent[0]}-*.parquet"
        )
    if found.get("train"):
        return "", [found[name] for name in ("train", "validation", "test")]
    cut = round(0.9 * len(found["validation"]))
    held_out = found["validation"][cut:]
    note = "there is no training part here: nine tenths of the official validation text are trained on, and the rest is held out"
    return note, [found["validation"][:cut], held_out, found["test"]]


def _as_characters(parts: list[str]) -> tuple[list[str], list[Tensor]]:
    """All characters of the text, and each part as their numbers."""
    classes = sorted(set().union(*parts))
    place = {character: i for i, character in enumerate(classes)}
    return classes, [
        torch.from_numpy(np.fromiter((place[c] for c in part), np.int64, len(part)))
        for part in parts
    ]


def _as_pairs(parts: list[str], count: int) -> tuple[list[str], list[Tensor]]:
    """Byte-pair tokens (Sennrich et al. 2016) of the first part, at most so many, and each part as their numbers.

    A token holds no bytes of two lines, and every text can be written with the 256 bytes.
    """
    from tokenizers import ByteLevelBPETokenizer

    if count <= 256:
        raise ConfigError(f"data.tokens is {count}: there are 256 bytes, so it must be more")
    tokenizer = ByteLevelBPETokenizer()
    lines = [part.splitlines(keepends=True) for part in parts]
    tokenizer.train_from_iterator(lines[0], vocab_size=count, show_progress=False)
    place = tokenizer.get_vocab()
    numbers = [
        [i for line in tokenizer.encode_batch(part) for i in line.ids] if part else []
        for part in lines
    ]
    return sorted(place, key=place.__getitem__), [
        torch.tensor(n, dtype=torch.int64) for n in numbers
    ]


def _windows(tokens: Tensor, context: int) -> Tensor:
    """[n, context + 1]: each begins where the one before ends, so that every token but the first is a target once."""
    if len(tokens) <= context:
        return tokens.new_empty(0, context + 1)
    return tokens.unfold(0, context + 1, context)
