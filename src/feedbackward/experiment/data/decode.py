"""Images of a source -> uint8 tensors, through the `datasets` package and Pillow."""

import glob
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from feedbackward.errors import DataError
from feedbackward.experiment.data.decode_progress import Progress, quiet_unless_terminal
from feedbackward.experiment.data.sources import Source

ORIENTATION = 0x0112  # the EXIF tag by which cameras say how to turn a photograph


@dataclass(frozen=True)
class Images:
    """Images uint8 [N, C, H, W] with their labels int64 [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> "Images":
        """The images at `index` (int64 [n]), copied."""
        return Images(self.images[index], self.labels[index])


@dataclass(frozen=True)
class Decoded:
    """Every split of a source as it is, with its class names in the order of the labels."""

    splits: dict[str, Images]
    classes: list[str]


def decode(source: Source, size: int | None) -> Decoded:
    """Decode all splits of `source`, each image resized to `size` x `size` if given.

    Raises DataError where the source cannot be read or is not what its specification says.
    """
    total = _count(source)
    try:
        with quiet_unless_terminal():
            rows_of = _open(source)
        tables = {ours: _table(source, rows_of, theirs) for ours, theirs in source.splits.items()}
        classes = _class_names(source, tables["train"])
        with Progress(f"Decoding {source.name}", total) as progress:
            splits = {
                split: _decode_split(
                    source,
                    f"{source.splits[split]} of {source}",
                    _cells(source, rows, progress),
                    size,
                )
                for split, rows in tables.items()
            }
    except (DataError, MemoryError):
        raise
    # datasets, pyarrow, fsspec and the hub's client have no common base class, and this is the one place
    # where their errors surface
    except Exception as error:
        raise _unreadable(source, error) from error
    for split, images in splits.items():
        _check_labels(source, source.splits[split], images.labels, classes)
        _check_shape(
            f"Split {source.splits[split]} of {source}", images.images, splits["train"].images
        )
    return Decoded(splits, classes)


def _unreadable(source: Source, error: Exception) -> DataError:
    cause = " ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
    if source.folder is None:
        return DataError(
            f"Data set {source} could not be read from the hub ({cause}): check the network, or read a "
            "local copy with --data-root, or use the embedded set 'fashion-mini', which needs no download."
        )
    return DataError(
        f"Data set {source} could not be read ({cause}): a file is truncated or damaged; fetch it again."
    )


def _count(source: Source) -> int | None:
    """The number of images, where cheap to tell; a truncated parquet file is named on the way."""
    if source.kind != "parquet":
        return len(source.files) or None
    import pyarrow.parquet as pq

    total = 0
    for path in source.files:
        try:
            total += pq.read_metadata(path).num_rows
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path} is not a whole parquet file ({error}): it is truncated; fetch it again."
            ) from error
    return total


def _open(source: Source) -> Any:
    """The source's splits as `datasets` gives them.

    Local files are streamed: they are read in place, and `datasets` then leaves no copy in its own cache.
    """
    from datasets import (
        load_dataset,  # imported here: it takes a second, which a warm cache need not pay
    )

    if source.folder is None:
        return load_dataset(source.spec.hub_id)
    if source.kind == "parquet":
        return load_dataset(str(source.folder), streaming=True)
    # a glob per split: given the folder, `datasets` also takes a class called "train" or "test" for a split
    base = glob.escape(str(source.folder))
    files = {split: f"{base}/{split}/*/*" for split in source.splits.values()}
    return load_dataset(
        "imagefolder", data_files=files, streaming=True, drop_labels=False, drop_metadata=True
    )


def _table(source: Source, rows_of: Any, split: str) -> Any:
    from datasets import Image as ImageFeature

    if split not in rows_of:
        raise DataError(
            f"Data set {source} has no split '{split}', only {', '.join(rows_of)}: fetch the missing files."
        )
    rows, spec = rows_of[split], source.spec
    features = rows.features or {}
    for column in (spec.image, spec.label):
        if column not in features:
            raise DataError(
                f"Split '{split}' of {source} has no column '{column}', only {', '.join(features)}: "
                f"it is not a copy of {spec.hub_id}."
            )
    # encoded bytes only: our own decoding then can name the image that fails
    return rows.select_columns([spec.image, spec.label]).cast_column(
        spec.image, ImageFeature(decode=False)
    )


def _class_names(source: Source, rows: Any) -> list[str]:
    expected = source.spec.num_classes
    names = getattr(rows.features[source.spec.label], "names", None)
    if names is None:
        names = [str(index) for index in range(expected or 0)]
    if expected not in (None, len(names)):
        raise DataError(
            f"Data set {source} has {len(names)} classes where {expected} belong: it is another data set."
        )
    if len(names) < 2:
        raise DataError(
            f"Data set {source} has {len(names)} class: give at least two class folders in train/."
        )
    return list(names)


def _cells(
    source: Source, rows: Any, progress: Progress
) -> Iterator[tuple[dict[str, Any], int | None]]:
    for batch in rows.iter(batch_size=256):
        yield from zip(batch[source.spec.image], batch[source.spec.label], strict=True)
        progress.advance(len(batch[source.spec.label]))


def _decode_split(source: Source, where: str, cells: Iterator[Any], size: int | None) -> Images:
    pixels, labels, shape = bytearray(), [], (0, 0, 0)
    for index, (cell, label) in enumerate(cells):
        name = cell["path"] if source.kind == "images" else f"Image {index} of split {where}"
        array = _pixels(cell, name, source.spec.mode, size)
        if index == 0:
            shape = array.shape
        elif array.shape != shape:
            (_, height, width), (_, rows, columns) = array.shape, shape
            raise DataError(
                f"{name} is {width} x {height} pixels, others {columns} x {rows}: set size= to resize them all."
            )
        if label is None:
            raise DataError(f"{name} has no label: remove it, or complete the labels.")
        pixels += array.tobytes()
        labels.append(label)
    if not labels:
        raise DataError(f"Split {where} is empty: fetch it again.")
    images = torch.frombuffer(pixels, dtype=torch.uint8).view(len(labels), *shape)
    return Images(images, torch.tensor(labels, dtype=torch.int64))


def _pixels(cell: dict[str, Any], name: str, mode: str, size: int | None) -> np.ndarray:
    """One encoded image -> uint8 [C, H, W]."""
    try:
        with Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] else cell["path"]) as opened:
            if opened.mode.startswith("I") or opened.mode == "F":
                raise DataError(
                    f"{name} has more than 8 bits per channel: save it as an 8-bit image."
                )
            return image_to_array(opened, mode, size)
    except (
        OSError,
        SyntaxError,
        ValueError,
        TypeError,
        AttributeError,
        Image.DecompressionBombError,
    ) as error:
        raise DataError(
            f"{name} cannot be decoded ({error}): the file is damaged; replace or remove it."
        ) from error


def image_to_array(image: Image.Image, mode: str, size: int | None) -> np.ndarray:
    """A Pillow image -> uint8 [C, H, W], upright, in `mode` (L: C = 1, RGB: C = 3), size x size if given."""
    if image.format == "JPEG":
        if size is not None:
            image.draft(mode, (size, size))  # decodes a large photograph at a fraction of its scale
        if image.getexif().get(ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
    if image.mode != mode:
        image = image.convert(mode)
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _check_shape(name: str, images: Tensor, expected: Tensor) -> None:
    (height, width), (rows, columns) = images.shape[2:], expected.shape[2:]
    if (height, width) != (rows, columns):
        raise DataError(
            f"{name} has images of {width} x {height} pixels, train of {columns} x {rows}: set size= to resize them all."
        )


def _check_labels(source: Source, split: str, labels: Tensor, classes: list[str]) -> None:
    wrong = ((labels < 0) | (labels >= len(classes))).nonzero().flatten()
    if len(wrong):
        index = int(wrong[0])
        raise DataError(
            f"Image {index} of split {split} of {source} has label {int(labels[index])}, outside 0 to "
            f"{len(classes) - 1}: the labels do not belong to these {len(classes)} classes."
        )
