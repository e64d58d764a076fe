"""Sentences as numbers of words, and the class of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from feedbackward.errors import ConfigError, DataError
from feedbackward.experiment.config.data import DataConfig
from feedbackward.experiment.data.named import file_digest, find_place, read_columns, refuse_options
from feedbackward.experiment.data.splits import Pairs, SplitData, split_order

# sets known by name, and where they lie below the data root
SENTENCES = {name: f"small/{name}" for name in ("sst2", "trec6", "mr", "subj")}
WORDS, LENGTH = 10_000, 64
# the numbers of what is no word, and of a word that is not known
PADDING, UNKNOWN = 0, 1


def load_sentences(config: DataConfig) -> SplitData:
    """A folder of Parquet files with the columns `text` and `label`: train, validation and test, or all of them in one.

    What a folder lacks is held out of what it trains on, a tenth each, in a fixed random order. Inputs are int64 [n, T]: the
    numbers of the first `config.context` (64) words, and `PADDING` behind them. Words are lower-case, and the 10,000 most
    frequent ones of what is trained on are known. Targets are int64 [n].
    Raises DataError for files that are missing or hold something else, and ConfigError for an option that is not of sentences.
    """
    refuse_options(config, "sentences", "classes", "size", "augment", "tokens")
    length = LENGTH if config.context is None else config.context
    if length < 1:
        raise ConfigError(f"data.context is {length}: it must be at least 1")
    found, note = _split(_read(config))
    limits = (config.train_limit, config.validation, config.test_limit)
    rows = [(t[:limit], y[:limit]) for (t, y), limit in zip(found, limits, strict=True)]
    if not all(len(texts) for texts, _ in rows):
        raise ConfigError(f"a split of {config.name} has no sentences: leave out limits of 0")
    tokenizer = _tokenizer(rows[0][0])
    train, validation, test = (
        Pairs(_numbers(tokenizer, texts, length), torch.from_numpy(labels))
        for texts, labels in rows
    )
    classes = [str(i) for i in range(1 + max(int(labels.max()) for _, labels in found))]
    words = tokenizer.get_vocab()
    form = {"input": "the numbers of words in words", "words": sorted(words, key=words.__getitem__)}
    name = Path(config.name).stem
    return SplitData(name, train, validation, test, classes, (length, len(words)), form, note)


def fingerprint_sentences(config: DataConfig) -> str:
    """A digest that is another as soon as a file has changed. Raises as `load_sentences` does."""
    return "-".join(map(file_digest, _files(config)))


def _files(config: DataConfig) -> list[Path]:
    folder = find_place(config, SENTENCES, "set of sentences")
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise DataError(
            f"There is no folder of Parquet files {folder}: this task needs one as data.name (known by name: {', '.join(SENTENCES)})."
        )
    return files


def _read(config: DataConfig) -> dict[str, tuple[list[str], np.ndarray]]:
    """Texts and labels by the first part of each file's name."""
    found: dict[str, tuple[list[str], np.ndarray]] = {}
    for path in _files(config):
        table = read_columns(path, "text", "label")
        texts, labels = table["text"].to_pylist(), table["label"].to_numpy()
        if not len(texts) or labels.dtype.kind not in "iu" or labels.min() < 0 or None in texts:
            raise DataError(f"{path} must have a text, and as label a number from 0, in every row")
        before = found.get(path.stem.partition("-")[0], ([], labels[:0]))
        joined = np.concatenate([before[1], labels]).astype(np.int64)
        found[path.stem.partition("-")[0]] = [*before[0], *texts], joined
    return found


def _split(found: dict[str, Any]) -> tuple[list[tuple[list[str], np.ndarray]], str]:
    """What to train on, held out and tested on, and a note."""
    texts, labels = found.get("train") or next(iter(found.values()))
    drawn = [name for name in ("validation", "test") if name not in found]
    order, tenth = split_order(len(texts)), len(texts) // 10
    for name in drawn:
        taken, order = order[:tenth], order[tenth:]
        found[name] = [texts[i] for i in taken], labels[taken]
    train = [texts[i] for i in order], labels[order]
    note = f"{' and '.join(drawn)}: a tenth of what would be trained on" if drawn else ""
    return [train, found["validation"], found["test"]], note


def _tokenizer(texts: list[str]) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordLevel(unk_token="[unknown]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[padding]", "[unknown]"]
    trainer = trainers.WordLevelTrainer(
        vocab_size=WORDS, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _numbers(tokenizer: Any, texts: list[str], length: int) -> Tensor:
    """[n, length]. A text without words is one unknown word: every row has a token."""
    found = torch.full((len(texts), length), PADDING)
    for row, encoded in zip(found, tokenizer.encode_batch(texts), strict=True):
        ids = (encoded.ids or [UNKNOWN])[:length]
        row[: len(ids)] = torch.tensor(ids)
    return found
