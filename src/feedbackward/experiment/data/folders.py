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


# why something is left out
_HIDDEN = "hidden"
_NO_IMAGE = "without the suffix of an image format that Pillow reads here"
_EMPTY = "a folder without images"
_NO_SPLIT = "neither train, validation nor test"


@dataclass(frozen=True)
class Listing:
    """The classes in the order of their labels; each split's images with their labels; what is left out, and why."""

    classes: list[str]
    images: dict[str, list[tuple[Path, int]]]
    left_out: list[tuple[str, str]]
    splits: dict[str, str]

    def note(self, first: int | None) -> str:
        """What is left out, and which of the `first` classes a split lacks, in words; empty where nothing is."""
        reasons = dict.fromkeys(reason for _, reason in self.left_out)
        parts = [
            f"{_some([path for path, why in self.left_out if why == reason])} ({reason})"
            for reason in reasons
        ]
        absent = [
            f"{self.splits[split]}/ has no image of {_some(missing)}"
            for split in self.images
            if (missing := self._missing(split, first))
        ]
        return "; ".join([*(["left out: " + ", ".join(parts)] if parts else []), *absent])

    def _missing(self, split: str, first: int | None) -> list[str]:
        filled = {label for _, label in self.images[split]}
        known = enumerate(self.classes[:first])
        return [printable(name) for label, name in known if label not in filled]

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
                    f"Class '{printable(empty)}' of '{name}' has no training image{self._why_empty(empty)}: add some, remove the "
                    "class, or keep only the first classes with classes=."
                )

    def _why_empty(self, name: str) -> str:
        for other in self.classes:
            if other != name and other.casefold() == name.casefold():
                return f" ('{printable(other)}' is another class)"
        held = [
            (path, why) for path, why in self.left_out if f"/{printable(name)}/" in _composed(path)
        ]
        if held:
            return f" (left out: {_some([path for path, _ in held])}, {held[0][1]})"
        label = self.classes.index(name)
        where = [self.splits[s] for s, rows in self.images.items() if label in {n for _, n in rows}]
        return f" (it has images in {where[0]}/)" if where else ""


def _some(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


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
    left_out: list[tuple[str, str]] = []
    for entry in _entries(folder, folder, left_out):
        if entry.is_dir() and entry.name not in splits.values():
            left_out.append((f"{_shown(entry.path, folder)}/", _NO_SPLIT))
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
    return Listing(classes, images, sorted(left_out), splits)


def _split(folder: Path, split: str, left_out: list[tuple[str, str]]) -> dict[str, list[Path]]:
    """Class -> its images, sorted."""
    places: dict[str, Path] = {}
    for entry in _entries(folder / split, folder, left_out):
        if not entry.is_dir():
            if _is_image(entry):
                raise _not_in_a_class(entry.path, split)
            left_out.append((_shown(entry.path, folder), _NO_IMAGE))
            continue
        name = _class_name(entry)
        if name in places:
            raise DataError(
                f"{folder / split} has two folders for the class '{printable(name)}', whose names differ in their Unicode form "
                "only (NFC, NFD): put their images into one."
            )
        places[name] = Path(entry.path)
    _check_different(places, f"the classes in {folder / split}")
    return {name: _of_class(folder, split, place, left_out) for name, place in places.items()}


def _of_class(folder: Path, split: str, place: Path, left_out: list[tuple[str, str]]) -> list[Path]:
    images = []
    for entry in _entries(place, folder, left_out):
        if entry.is_dir():
            deeper = next(_images_below(entry.path), None)
            if deeper is not None:
                raise _not_in_a_class(deeper, split)
            left_out.append((_shown(entry.path, folder) + "/", _EMPTY))
        elif _is_image(entry):
            images.append(Path(entry.path))
        else:
            left_out.append((_shown(entry.path, folder), _NO_IMAGE))
    return sorted(images, key=lambda path: path.name)


def _entries(
    place: Path, folder: Path, left_out: list[tuple[str, str]]
) -> Iterator[os.DirEntry[str]]:
    """What a folder holds, without what is hidden. Raises DataError for a link to nowhere, or in a circle."""
    with os.scandir(place) as entries:
        for entry in entries:
            if entry.name.lower() in _LEFT_BY_SYSTEMS or entry.name.startswith("._"):
                continue
            if entry.name.startswith("."):
                if place != folder and (entry.is_dir() or _is_image(entry)):
                    left_out.append((_shown(entry.path, folder), _HIDDEN))
            elif entry.is_symlink() and not os.path.exists(entry.path):
                raise DataError(
                    f"{printable(entry.path)} is a link to {printable(os.readlink(entry.path))}, which is not there: "
                    "mend or remove the link."
                )
            elif place != folder and entry.is_symlink() and _holds(entry.path, place):
                raise DataError(
                    f"{printable(entry.path)} is a link to {os.path.realpath(entry.path)}, a folder that holds it: remove the link."
                )
            else:
                yield entry


def _holds(outer: str, inner: Path) -> bool:
    whole, part = os.path.realpath(outer), os.path.realpath(inner)
    return os.path.isdir(whole) and os.path.commonpath([whole, part]) == whole


def files_below(place: str | Path) -> Iterator[str]:
    """Every file below, links to folders followed, each folder once, none that is hidden."""
    seen: set[str] = set()
    for base, folders, names in os.walk(place, followlinks=True):
        seen.add(os.path.realpath(base))
        folders[:] = [
            f for f in folders if f[0] != "." and os.path.realpath(f"{base}/{f}") not in seen
        ]
        yield from (os.path.join(base, name) for name in names)


def _images_below(place: str) -> Iterator[str]:
    return (path for path in files_below(place) if _suffix(path) in suffixes())


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
            f"The name of the class folder {printable(entry.path)} is not UTF-8: rename the folder."
        ) from error
    return _composed(entry.name)


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _check_different(places: dict[str, Path], what: str) -> None:
    """Raise DataError where two folders are the same one by a link: the images would count twice."""
    seen: dict[str, str] = {}
    for name, place in sorted(places.items()):
        other = seen.setdefault(os.path.realpath(place), name)
        if other != name:
            raise DataError(
                f"Of {what}, '{printable(other)}' and '{printable(name)}' are the same folder, by a link: remove one of them."
            )


def _check_not_empty(
    place: Path, by_class: dict[str, list[Path]], left_out: list[tuple[str, str]]
) -> None:
    if not any(by_class.values()):
        own = [path for path, _ in left_out if path.startswith(f"{place.name}/")]
        held = f" that can be read ({_some(own, 3)})" if own else ""
        raise DataError(
            f"{place} holds no images{held}: put them in {place.name}/<class>/ as PNG or JPEG files, or remove {place.name}/."
        )


def _in_order(by_class: dict[str, list[Path]]) -> list[str]:
    # as the paths sort, so that "a b/" comes before "a/"
    return sorted(by_class, key=lambda name: f"{name}/")


def _not_in_a_class(path: str, split: str) -> DataError:
    return DataError(
        f"{printable(path)} does not lie directly in a class folder: the layout is {split}/<class>/<image>, "
        "one level of class folders; move it there, or out of this folder."
    )


def _shown(path: str, folder: Path) -> str:
    return printable(os.path.relpath(path, folder))


def printable(name: str) -> str:
    """A name as it can stand in a message: on one line, whatever its bytes are."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
