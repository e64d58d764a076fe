"""Images of a source -> uint8 tensors, through the `datasets` package and Pillow."""

import io
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from feedbackward.errors import DataError
from feedbackward.experiment.data.decode_progress import Progress, quiet_unless_terminal
from feedbackward.experiment.data.digest import digest_of
from feedbackward.experiment.data.folders import printable
from feedbackward.experiment.data.sources import Source

ORIENTATION = 0x0112  # the EXIF tag by which cameras say how to turn a photograph
_TURNS = {  # by its value; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


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

    def digest(self) -> str:
        """SHA-256 over shape, pixels and labels, in order."""
        return digest_of(self.images, self.labels)


@dataclass(frozen=True)
class Decoded:
    """Every split of a source as it is, its class names in the order of the labels, and what there is to note."""

    splits: dict[str, Images]
    classes: list[str]
    note: str = ""


def decode(source: Source, size: int | None) -> Decoded:
    """Decode all splits of `source`, each image resized to `size` x `size` if given.

    Raises DataError where the source cannot be read or is not what its specification says.
    """
    several: list[str] = []
    try:
        classes, cells = _listed(source) if source.listing else _from_library(source)
        with (
            Progress(f"Decoding {source.name}", _count(source)) as progress,
            warnings.catch_warnings(),
        ):
            # a picture that is large is the user's own
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            splits = {
                split: _decode_split(
                    source,
                    f"{source.splits[split]} of {source}",
                    _advancing(rows, progress),
                    size,
                    several,
                )
                for split, rows in cells.items()
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
    return Decoded(splits, classes, _note_of(several))


def _note_of(several: list[str]) -> str:
    if not several:
        return ""
    files = "file holds" if len(several) == 1 else "files hold"
    return f"{len(several):,} {files} several pictures, of which the first is used ({several[0]})"


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
    for path in source.parquet:
        try:
            total += pq.read_metadata(path).num_rows
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path} is not a whole parquet file ({error}): it is truncated; fetch it again."
            ) from error
    return total


Cells = Iterable[tuple[dict[str, Any], int | None]]  # an encoded image, or its path, and its label


def _listed(source: Source) -> tuple[list[str], dict[str, Cells]]:
    """Classes and cells of a folder of images."""
    assert source.listing is not None
    cells: dict[str, Cells] = {
        split: [({"path": str(path), "bytes": None}, label) for path, label in rows]
        for split, rows in source.listing.images.items()
    }
    return source.listing.classes, cells


def _from_library(source: Source) -> tuple[list[str], dict[str, Cells]]:
    """Classes and cells of what the `datasets` package reads."""
    _count(source)  # names a truncated file
    with quiet_unless_terminal():
        rows_of = _open(source)
    tables = {ours: _table(source, rows_of, theirs) for ours, theirs in source.splits.items()}
    return _class_names(source, tables["train"]), {
        split: _cells(source, rows) for split, rows in tables.items()
    }


def _open(source: Source) -> Any:
    """The source's splits as `datasets` gives them.

    Local files are streamed: they are read in place, and `datasets` then leaves no copy in its own cache.
    """
    from datasets import (
        load_dataset,  # imported here: it takes a second, which a warm cache need not pay
    )

    if source.folder is None:
        return load_dataset(source.spec.hub_id)
    return load_dataset(str(source.folder), streaming=True)


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


def _cells(source: Source, rows: Any) -> Cells:
    for batch in rows.iter(batch_size=256):
        yield from zip(batch[source.spec.image], batch[source.spec.label], strict=True)


def _advancing(cells: Cells, progress: Progress) -> Cells:
    for done, cell in enumerate(cells, 1):
        yield cell
        if done % 256 == 0:
            progress.advance(256)


def _decode_split(
    source: Source, where: str, cells: Cells, size: int | None, several: list[str]
) -> Images:
    pixels, labels, shape = bytearray(), [], (0, 0, 0)
    for index, (cell, label) in enumerate(cells):
        name = (
            printable(cell["path"])
            if source.kind == "images"
            else f"Image {index} of split {where}"
        )
        array, alone = _pixels(cell, name, source.spec.mode, size)
        several += [] if alone else [name]
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


def _pixels(
    cell: dict[str, Any], name: str, mode: str, size: int | None
) -> tuple[np.ndarray, bool]:
    """One encoded image -> uint8 [C, H, W], and whether its file holds no other."""
    try:
        encoded = _encoded(cell)
        with Image.open(encoded) as opened:
            if opened.mode.startswith("I") or opened.mode == "F":
                raise DataError(
                    f"{name} has more than 8 bits per channel: save it as an 8-bit image."
                )
            # the further pictures of MPO are other views of the same photograph
            alone = opened.format == "MPO" or not getattr(opened, "is_animated", False)
            return image_to_array(opened, mode, size), alone
    except Image.DecompressionBombError as error:
        raise DataError(f"{name} is larger than Pillow opens ({error}): scale it down.") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{name} cannot be decoded: {_instead_of_image(encoded)}.") from error
    except (OSError, SyntaxError, ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"{name} cannot be decoded ({error}): the file is damaged; replace or remove it."
        ) from error


def _encoded(cell: dict[str, Any]) -> io.BytesIO:
    # never a file of its own: Pillow maps some TIFF files into memory, and scrambles those that are turned by 90 degrees
    return io.BytesIO(cell["bytes"] or Path(cell["path"]).read_bytes())


def _instead_of_image(encoded: io.BytesIO) -> str:
    """What a file holds that is none, and what to do about it."""
    start = encoded.getvalue()[:100]
    if not start:
        return "the file is empty; replace or remove it"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS; run git lfs pull"
    return "it is no image of a format that Pillow reads here, or damaged; replace or remove it"


def image_to_array(image: Image.Image, mode: str, size: int | None) -> np.ndarray:
    """A Pillow image -> uint8 [C, H, W], upright, in `mode` (L: C = 1, RGB: C = 3), size x size if given."""
    if image.format == "JPEG" and size is not None:
        image.draft(mode, (size, size))  # decodes a large photograph at a fraction of its scale
    image = _upright(image)
    if image.mode != mode:
        image = image.convert(mode)
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _upright(image: Image.Image) -> Image.Image:
    """The image as its EXIF or XMP says that it is to be seen, whatever the container."""
    image.load()  # first: a PNG may say so after its pixels, and Pillow turns TIFF by itself while it loads
    try:
        turn = _TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # metadata that no viewer could make sense of; the pixels are whole
        turn = None
    return image if turn is None else image.transpose(turn)


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
