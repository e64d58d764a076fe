"""Clicks: what was shown to whom, as numbers of values, and whether it was clicked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from feedbackward.errors import ConfigError, DataError
from feedbackward.experiment.config.data import DataConfig
from feedbackward.experiment.data.named import file_digest, find_file, read_arrays, refuse_options
from feedbackward.experiment.data.splits import SPLIT_SEED, Pairs, SplitData, split_order

EMBEDDED = "clicks"
# the fields of the embedded clicks, and how many values each has
FIELDS = {"user": 200, "item": 300, "category": 20, "hour": 24, "device": 3}
COUNT = 160_000
# a table of more embeddings fits no machine
MOST_VALUES = 2**30


def load_clicks(config: DataConfig) -> SplitData:
    """The drawn clicks, or those of an .npz file: five eighths to train on, one eighth held out, a quarter to test on.

    Inputs are int64 [n, fields], and targets int64 [n]: 1 for a click. Values of all fields are numbered one after the other, so that
    one table has an embedding of each. The split is drawn, in a fixed random order. A file has `fields`, int [n, fields] from 0, and
    `clicks`, [n] of 0 and 1.
    Raises DataError for a file that is missing or has other arrays, and ConfigError for an option that is not of clicks.
    """
    refuse_options(config, "clicks", "classes", "size", "augment", "tokens", "context")
    if config.name == EMBEDDED:
        fields, clicks, chance = drawn()
    else:
        fields, clicks, chance = *_read(config), None
    sizes = fields.max(0) + 1
    starts = np.cumsum(sizes) - sizes
    whole = Pairs(torch.from_numpy(fields + starts), torch.from_numpy(clicks))
    order = torch.from_numpy(split_order(len(whole))).long()
    eighth = len(order) // 8
    cut = (order[3 * eighth :], order[:eighth], order[eighth : 3 * eighth])
    limits = (config.train_limit, config.validation, config.test_limit)
    parts = [part[:limit] for part, limit in zip(cut, limits, strict=True)]
    train, validation, test = (whole.take(part) for part in parts)
    if not (len(train) and len(validation) and len(test)):
        raise ConfigError(
            f"a split of {config.name} has no rows: it needs at least 8 rows, and limits above 0"
        )
    form = {
        "input": "the value of each field, numbered over all fields",
        "first_value": starts.tolist(),
    }
    shape = fields.shape[1], int(sizes.sum())
    note = "" if chance is None else _best(torch.from_numpy(chance)[parts[2]], test.targets)
    return SplitData(config.name, train, validation, test, ["no click", "click"], shape, form, note)


def fingerprint_clicks(config: DataConfig) -> str:
    """A digest that is another as soon as the file has changed. Raises as `load_clicks` does."""
    return EMBEDDED if config.name == EMBEDDED else file_digest(_file(config))


def drawn() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The embedded clicks: fields int64 [n, 5], clicks int64 [n], and the probability that each was drawn with, [n].

    The log-odds are a sum of biases, of products of what a user likes and what an item has, which a factorisation machine can tell,
    and of a table of the user's kind, the category and the part of the day, which needs more than pairs of fields.
    """
    # RandomState, because its streams are guaranteed never to change
    random = np.random.RandomState(SPLIT_SEED)
    users, items, categories, hours, devices = FIELDS.values()
    category_of = random.randint(categories, size=items)
    likes, has = random.randn(users, 3), random.randn(items, 3)
    bias = [0.5 * random.randn(size) for size in (users, items, devices)]
    kind = random.randint(6, size=users)
    table = 1.5 * random.randn(6, categories, 4)
    # some items are shown far more often than others
    shown = random.permutation(items)[(items * random.rand(COUNT) ** 2).astype(np.int64)]
    user = random.randint(users, size=COUNT)
    hour, device = random.randint(hours, size=COUNT), random.randint(devices, size=COUNT)
    category = category_of[shown]
    odds = -1.5 + bias[0][user] + bias[1][shown] + bias[2][device]
    odds += 0.4 * (likes[user] * has[shown]).sum(1) + table[kind[user], category, hour // 6]
    chance = 1 / (1 + np.exp(-odds))
    clicks = (random.rand(COUNT) < chance).astype(np.int64)
    return np.stack([user, shown, category, hour, device], 1).astype(np.int64), clicks, chance


def area(scores: Tensor, clicks: Tensor) -> float:
    """The area under the ROC curve: the probability that a click has a higher score than what was not clicked; a tie counts half."""
    _, place, count = scores.double().unique(return_inverse=True, return_counts=True)
    count = count.double()
    # the mean rank of each score's ties, from 1
    rank = (count.cumsum(0) - (count - 1) / 2)[place]
    positive = clicks > 0
    p = int(positive.sum())
    pairs = p * (len(clicks) - p)
    return float((rank[positive].sum() - p * (p + 1) / 2) / pairs) if pairs else float("nan")


def _best(chance: Tensor, clicks: Tensor) -> str:
    """What nobody can do better than, on these rows."""
    loss = torch.nn.functional.binary_cross_entropy(chance, clicks.double())
    return (
        f"with the probabilities that they were drawn with, the test clicks have a log loss of {loss:.4f} and an AUC of "
        f"{area(chance, clicks):.4f}"
    )


def _file(config: DataConfig) -> Path:
    return find_file(config, {}, "clicks")


def _read(config: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    path = _file(config)
    arrays = read_arrays(path, ("fields", "clicks"))
    fields, clicks = arrays["fields"], arrays["clicks"]
    whole = fields.dtype.kind in "iu" and fields.ndim == 2 and clicks.shape == fields.shape[:1]
    if not (whole and fields.size) or fields.min() < 0 or not np.isin(clicks, (0, 1)).all():
        raise DataError(
            f"the arrays of {path} do not fit: fields must be integers from 0, [n, fields], and clicks 0 or 1, [n]; they are "
            f"{fields.dtype} {list(fields.shape)} and {clicks.dtype} {list(clicks.shape)}"
        )
    values = sum(int(largest) + 1 for largest in fields.max(0))
    if values > MOST_VALUES:
        raise DataError(
            f"the fields of {path} go up to {int(fields.max())}, so a table of embeddings would have {values:,} rows. "
            "Number the values of every field from 0: np.unique(column, return_inverse=True)[1]."
        )
    return fields.astype(np.int64), clicks.astype(np.int64)
