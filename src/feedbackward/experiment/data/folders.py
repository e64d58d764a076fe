"""Folders of images, `<split>/<class>/<image>`: the one listing that counting, decoding and the cache all use.

An image is a file with a suffix of a format that Pillow reads here. A class is a folder of a split, by its name
in Unicode's composed form (NFC), which is how a name looks the same wherever it was typed. Links are followed.
What is left out is named, but for what operating systems leave behind.
"""

from __future__ import annotations

import functools
import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from feedbackward.errors import DataError

# Pillow registers these to recognise them, or needs another program to draw them: they hold no photographs
_NO_PIXELS = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
_LEFT_BY_SYSTEMS = {
    *(".ds_store", "thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", ".ipynb_checkpoints"),
    *("@eadir", "$recycle.bin", "lost+found", "system volume information"),
}


@dataclass(frozen=True)
class Listing:
    """The classes in the order of their labels; each split's images with their labels; what is left out."""

    classes: list[str]
    images: dict[str, list[tuple[Path, int]]]
    left_out: list[str]

    @property
    def note(self) -> str:
        """What is left out, in words; empty where everything is read."""
        if not self.left_out:
            return ""
        more = f" and {len(self.left_out) - 5:,} more" if len(self.left_out) > 5 else ""
        return f"left out, for they are no images that can be read: {', '.join(self.left_out[:5])}{more}"

    def check_filled(self, name: str, first: int | None) -> None:
        """Raise DataError where there is one class, or one of the `first` classes has no training image."""
        if len(self.classes) < 2:
            raise DataError(
                f"'{name}' has {len(self.classes)} class: give at least two class folders in train/."
            )
        filled = {label for _, label in self.images["train"]}
        for label, empty in enumerate(self.classes[:first]):
            if label not in filled:
                raise DataError(
                    f"Class '{empty}' of '{name}' has no training image{self._why_empty(empty)}: add some, remove the "
                    "class, or keep only the first classes with classes=."
                )

    def _why_empty(self, name: str) -> str:
        for other in self.classes:
            if other != name and other.casefold() == name.casefold():
                return f" ('{other}' is another class)"
        held = [path for path in self.left_out if f"/{name}/" in unicodedata.normalize("NFC", path)]
        return f" (what it holds cannot be read: {', '.join(held[:3])})" if held else ""


def list_images(folder: Path, splits: dict[str, str]) -> Listing:
    """All images of `folder`, where `splits` maps our names of the splits to the folders'.

    Raises DataError where two folders are one, a link leads nowhere, a name cannot be kept, or an image does not
    lie in a class folder.
    """
    try:
        return _list(folder, splits)
    except OSError as error:
        raise DataError(
            f"{error.filename or folder} cannot be listed ({error.strerror})."
        ) from error


def _list(folder: Path, splits: dict[str, str]) -> Listing:
    left_out: list[str] = []
    for entry in _entries(folder, folder, left_out):
        if entry.is_dir() and entry.name not in splits.values():
            left_out.append(f"{entry.name}/")
    _check_different({name: folder / name for name in splits.values()}, f"the splits of {folder}")
    found = {ours: _split(folder, name, left_out) for ours, name in splits.items()}
    classes = sorted({name for images in found.values() for name in images})
    labels = {name: label for label, name in enumerate(classes)}
    images = {
        split: [(path, labels[name]) for name in _in_order(by_class) for path in by_class[name]]
        for split, by_class in found.items()
    }
    for split, by_class in found.items():
        _check_not_empty(folder / splits[split], by_class, left_out)
    return Listing(classes, images, sorted(left_out))


def _split(folder: Path, split: str, left_out: list[str]) -> dict[str, list[Path]]:
    """Class -> its images, sorted."""
    places: dict[str, Path] = {}
    for entry in _entries(folder / split, folder, left_out):
        if not entry.is_dir():
            if _is_image(entry):
                raise _not_in_a_class(entry.path, split)
            left_out.append(_shown(entry.path, folder))
            continue
        name = _class_name(entry)
        if name in places:
            raise DataError(
                f"{folder / split} has two folders for the class '{name}', whose names differ in their Unicode form "
                "only (NFC, NFD): put their images into one."
            )
        places[name] = Path(entry.path)
    _check_different(places, f"the classes in {folder / split}")
    return {name: _of_class(folder, split, place, left_out) for name, place in places.items()}


def _of_class(folder: Path, split: str, place: Path, left_out: list[str]) -> list[Path]:
    images = []
    for entry in _entries(place, folder, left_out):
        if entry.is_dir():
            deeper = next(_images_below(entry.path), None)
            if deeper is not None:
                raise _not_in_a_class(deeper, split)
            left_out.append(_shown(entry.path, folder) + "/")
        elif _is_image(entry):
            images.append(Path(entry.path))
        else:
            left_out.append(_shown(entry.path, folder))
    return sorted(images, key=lambda path: path.name)


def _entries(place: Path, folder: Path, left_out: list[str]) -> Iterator[os.DirEntry[str]]:
    """What a folder holds, without what is hidden. Raises DataError for a link to nowhere."""
    with os.scandir(place) as entries:
        for entry in entries:
            if entry.name.lower() in _LEFT_BY_SYSTEMS or entry.name.startswith("._"):
                continue
            if entry.name.startswith("."):
                if place != folder and (entry.is_dir() or _is_image(entry)):
                    left_out.append(_shown(entry.path, folder))
            elif entry.is_symlink() and not os.path.exists(entry.path):
                raise DataError(
                    f"{entry.path} is a link to {os.readlink(entry.path)}, which is not there: mend or remove the link."
                )
            else:
                yield entry


def _images_below(place: str) -> Iterator[str]:
    for base, _, names in os.walk(place, followlinks=True):
        yield from (os.path.join(base, name) for name in names if _suffix(name) in suffixes())


@functools.cache
def suffixes() -> frozenset[str]:
    """The suffixes, in lower case with their dot, of the image formats that Pillow reads here."""
    Image.init()
    formats = set(Image.OPEN) - _NO_PIXELS
    return frozenset(end for end, name in Image.registered_extensions().items() if name in formats)


def _is_image(entry: os.DirEntry[str]) -> bool:
    return _suffix(entry.name) in suffixes() and entry.is_file()


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _class_name(entry: os.DirEntry[str]) -> str:
    try:
        entry.name.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"The name of the class folder {_printable(entry.path)} is not UTF-8: rename the folder."
        ) from error
    return unicodedata.normalize("NFC", entry.name)


def _check_different(places: dict[str, Path], what: str) -> None:
    """Raise DataError where two folders are the same one by a link: the images would count twice."""
    seen: dict[str, str] = {}
    for name, place in sorted(places.items()):
        other = seen.setdefault(os.path.realpath(place), name)
        if other != name:
            raise DataError(
                f"Of {what}, '{other}' and '{name}' are the same folder, by a link: remove one of them."
            )


def _check_not_empty(place: Path, by_class: dict[str, list[Path]], left_out: list[str]) -> None:
    if not any(by_class.values()):
        held = f" that can be read ({', '.join(left_out[:3])})" if left_out else ""
        raise DataError(
            f"{place} holds no images{held}: put them in {place.name}/<class>/ as PNG or JPEG files."
        )


def _in_order(by_class: dict[str, list[Path]]) -> list[str]:
    # as the paths sort, so that "a b/" comes before "a/"
    return sorted(by_class, key=lambda name: f"{name}/")


def _not_in_a_class(path: str, split: str) -> DataError:
    return DataError(
        f"{_printable(path)} does not lie directly in a class folder: the layout is {split}/<class>/<image>, "
        "one level of class folders."
    )


def _shown(path: str, folder: Path) -> str:
    return _printable(os.path.relpath(path, folder))


def _printable(path: str) -> str:
    return os.fsencode(path).decode("utf-8", "backslashreplace")
