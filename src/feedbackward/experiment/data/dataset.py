"""Data sets as uint8 tensors: training, held-out validation and test.

`load_data(DataConfig("cifar10", root="data"))` is the one call. A known data set comes from the Hugging Face
hub, or from a folder in the hub's layout when `root` is given; "fashion-mini" is part of the package; any
other name is the path of an image folder `train/<class>/<image>`. `test/` beside `train/` is the test split
(without it `validation/` is, without both it is held out of train); beside both, `validation/` is the
held-out validation split.
"""

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from feedbackward.errors import ConfigError, DataError
from feedbackward.experiment.config.data import DataConfig
from feedbackward.experiment.data.cache import cached, fingerprint
from feedbackward.experiment.data.decode import Decoded, Images, decode
from feedbackward.experiment.data.digest import digests_of
from feedbackward.experiment.data.fashion_mini import fashion_mini
from feedbackward.experiment.data.loader import AUGMENTATIONS, Loader, find_transform
from feedbackward.experiment.data.named import refuse_options
from feedbackward.experiment.data.sources import DATASETS, DatasetSpec, Source, find_source
from feedbackward.experiment.data.splits import split_order

__all__ = [
    "AUGMENTATIONS",
    "DATASETS",
    "Data",
    "DataConfig",
    "DatasetSpec",
    "Images",
    "Loader",
    "load_data",
]


@dataclass(frozen=True)
class Data:
    """A data set, split. `mean` and `std` are per channel over the training split, of pixels in [0, 1]."""

    name: str
    train: Images
    validation: Images
    test: Images
    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    note: str = ""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    @property
    def form(self) -> dict[str, Any]:
        """What a model needs to know of its inputs; a pixel enters it as (pixel / 255 - mean) / std, per channel."""
        channels, height, width = self.shape
        mean, std = (", ".join(f"{v:.4f}" for v in values) for values in (self.mean, self.std))
        return {
            "channels": channels,
            "height": height,
            "width": width,
            "mean": list(self.mean),
            "std": list(self.std),
            "input": f"(pixel / 255 - ({mean})) / ({std})",
        }

    @functools.cached_property
    def digests(self) -> dict[str, str]:
        """SHA-256 over the pixels and the labels of each split, in order."""
        return digests_of(self)

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.classes)


def load_data(config: DataConfig) -> Data:
    """Load a data set; validation and test images are in a fixed shuffled order.

    Raises ConfigError for an option that is unknown or out of range and DataError for data that is missing,
    damaged or does not fit; both say how to mend it.
    """
    _check(config)
    source = find_source(config.name, config.root)
    if source.listing is not None:
        source.listing.check_filled(config.name, config.classes)
    if config.name == "fashion-mini":
        decoded = fashion_mini(config.size)
    else:
        decoded = cached(source, config.size, lambda: decode(source, config.size))
    classes = decoded.classes[: config.classes]
    if config.classes is not None and config.classes > len(classes):
        raise ConfigError(
            f"classes is {config.classes}, but '{config.name}' has {len(classes)} classes."
        )
    _check_classes_filled(decoded.splits["train"].labels, classes, config.name)
    chosen = _split(decoded, config)
    train, validation, test = (decoded.splits[name].take(index) for name, index in chosen.values())
    if not (len(validation) and len(test)):
        raise DataError(
            f"'{config.name}' has {len(validation)} validation and {len(test)} test images of the classes "
            f"{', '.join(classes)}: complete these splits, or choose other classes."
        )
    notes = [
        source.spec.note,
        *_missing(decoded, source.spec.official),
        *_warned(source, decoded, config.classes),
    ]
    if chosen["test"][0] == "train":
        notes.append(f"there is no test folder: test is {len(test):,} images held out of train")
    mean, std = _mean_std(train.images)
    note = "; ".join(text for text in notes if text)
    return Data(source.name, train, validation, test, classes, mean, std, note)


def fingerprint_data(config: DataConfig) -> str:
    """A digest that is another as soon as a file that `load_data` reads has changed. Raises as `load_data` does."""
    return fingerprint(find_source(config.name, config.root), config.size)


def _warned(source: Source, decoded: Decoded, first: int | None) -> list[str]:
    """What of a folder is not used, in words, after a warning that says it."""
    listed = source.listing.note(first) if source.listing else ""
    notes = [note for note in (listed, decoded.note) if note]
    if notes:
        warnings.warn(f"Of {source}: {'; '.join(notes)}.", RuntimeWarning, stacklevel=3)
    return notes


def _check(config: DataConfig) -> None:
    refuse_options(config, "images", "tokens", "context")
    find_transform(config.augment)
    least = {"train_limit": 1, "validation": 1, "test_limit": 1, "classes": 2, "size": 1}
    for option, smallest in least.items():
        value = getattr(config, option)
        if value is not None and value < smallest:
            raise ConfigError(f"{option} is {value}: it must be at least {smallest}.")


def _check_classes_filled(labels: Tensor, classes: list[str], name: str) -> None:
    counts = torch.bincount(labels, minlength=len(classes)).tolist()[: len(classes)]
    if 0 in counts:
        raise DataError(
            f"Class '{classes[counts.index(0)]}' of '{name}' has no training image: add some, remove the "
            "class, or keep only the first classes with classes=."
        )


def _missing(decoded: Decoded, official: tuple[int, int] | None) -> list[str]:
    """What a partial copy lacks, in words."""
    if official is None:
        return []
    counts = {
        split: (len(decoded.splits[split]), whole)
        for split, whole in zip(("train", "test"), official, strict=True)
    }
    return [
        f"{split} is only {count:,} of the {whole:,} official images"
        for split, (count, whole) in counts.items()
        if count != whole
    ]


def _split(decoded: Decoded, config: DataConfig) -> dict[str, tuple[str, Tensor]]:
    """Ours -> (the source's split, index int64 [n] into it), for train, validation and test in this order.

    Held-out images are cut off before the training limit: it does not change what is selected on.
    """
    order = {
        name: _shuffled(images.labels, config.classes) for name, images in decoded.splits.items()
    }
    train = order["train"]
    if "test" in order:
        test = ("test", order["test"])
    else:
        held_out, train = _hold_out(train, None, config.name)
        test = ("train", held_out)
    if "validation" not in order:
        held_out, train = _hold_out(train, config.validation, config.name)
        validation = ("train", held_out)
    elif config.validation is None:
        validation = ("validation", order["validation"])
    else:
        raise ConfigError(
            f"'{config.name}' has a folder of validation images: leave out the option validation."
        )
    limited = (test[0], test[1][: config.test_limit])
    return {
        "train": ("train", train[: config.train_limit]),
        "validation": validation,
        "test": limited,
    }


def _shuffled(labels: Tensor, classes: int | None) -> Tensor:
    """The index [n] of the images of the first `classes` classes, in a fixed random order."""
    order = torch.from_numpy(split_order(len(labels))).to(torch.int64)
    return order if classes is None else order[labels[order] < classes]


def _hold_out(index: Tensor, count: int | None, name: str) -> tuple[Tensor, Tensor]:
    """The first `count` of an index, and the rest."""
    count = min(5_000, max(1, len(index) // 8)) if count is None else count
    if count >= len(index):
        raise ConfigError(
            f"Holding out {count} images leaves none of the {len(index)} training images of '{name}': "
            "set validation= to a smaller number, or add images."
        )
    return index[:count], index[count:]


def _mean_std(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per channel, exactly: from the histogram of the 256 values, in float64."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = (share * values).sum()
        std = (share * (values - mean).square()).sum().sqrt()
        means.append(mean.item())
        stds.append(std.item() or 1.0)  # a constant channel stays as it is
    return tuple(means), tuple(stds)
