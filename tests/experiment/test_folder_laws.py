"""Laws of image folders: every image and class on the disk is read or named, also from the cache."""

from __future__ import annotations

import os
import struct
import tempfile
import unicodedata
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from data_files import folder_of
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from feedbackward.errors import DataError
from feedbackward.experiment.data import Data, DataConfig, load_data
from feedbackward.experiment.data.folders import printable

CLASSES = [
    "cat",
    "Cat",
    "a b",
    "a",
    "[x]*?",
    "__none__",
    "_x",
    "train",
    "0",
    "10",
    "naïve",
    "y" * 120,
]
CLASSES += ["a\nb\x1b[1m", "{a,b}", "!no", "日本", "cat.png", "~", "#1", "e\u0301t\u00e9"]
SUFFIXES = [".png", ".PNG", ".bmp", ".tga", ".tif", ".ppm", ".gif", ".ico", ".qoi", ".dib", ".pcx"]
STEMS = ["{}", "{} (1)", "[{}]", "{}*", "é{}", "{}.jpg", "_{}", "{}" + "z" * 150, "-{}", "~{}"]
OTHERS = [
    ".hidden.png",
    "copy.png~",
    "notes.txt",
    "labels.csv",
    "photo.heic",
    "no_suffix",
    "movie.mpg",
    "array.npy",
]
SILENT = [".DS_Store", "Thumbs.db", "._0.png", "desktop.ini"]


@dataclass
class Tree:
    """A folder on the disk, and what it truly holds."""

    root: Path
    images: dict[str, Counter] = field(default_factory=dict)  # split -> (class, number) -> count
    named: set[str] = field(default_factory=set)  # what the note must name
    made: int = 0

    def add_image(self, split: str, name: str, folder: Path, stem: str, suffix: str) -> None:
        """One more image, of a flat colour that no other image has."""
        self.made += 1
        number = self.made
        colour = (number // 16 * 16, number % 16 * 16, 200)
        picture = Image.new("RGB", (16, 16), colour)
        kind = {"format": "PNG"} if suffix == ".PNG" else {}
        picture.save(folder / (stem.format(number) + suffix), **kind)
        self.images[split][unicodedata.normalize("NFC", name), colour] += 1


@st.composite
def trees(draw: st.DrawFn) -> list[tuple]:
    """Steps that make a tree: (split, class, linked, images, others) per class folder."""
    names = draw(st.lists(st.sampled_from(CLASSES), min_size=2, max_size=4, unique=True))
    splits = draw(st.sampled_from([["train"], ["train", "test"], ["train", "val", "tests"]]))
    steps = []
    for split in splits:
        for name in names:
            if split != "train" and name != names[0] and draw(st.booleans()):
                continue  # a class need not be in every split
            form = draw(st.sampled_from(["NFC", "NFD"]))
            fewest = 4 if split == "train" else 1
            pictures = st.tuples(st.sampled_from(STEMS), st.sampled_from(SUFFIXES))
            images = draw(st.lists(pictures, min_size=fewest, max_size=6))
            others = draw(st.lists(st.sampled_from(OTHERS + SILENT), max_size=2, unique=True))
            link = draw(st.booleans())
            steps.append((split, unicodedata.normalize(form, name), link, images, others))
    return steps


def build(base: Path, steps: list[tuple]) -> Tree:
    tree = Tree(base / "set")
    for at, (split, name, link, images, others) in enumerate(steps):
        folder = tree.root / split / name
        tree.images.setdefault(split, Counter())
        if link:
            (base / "store" / str(at)).mkdir(parents=True)
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.symlink_to(base / "store" / str(at), target_is_directory=True)
        else:
            folder.mkdir(parents=True)
        for stem, suffix in images:
            tree.add_image(split, name, folder, stem, suffix)
        for other in others:
            (folder / other).write_bytes(b"something else")
            if other in OTHERS:
                tree.named.add(f"{split}/{name}/{other}")
    return tree


def read(data: Data) -> Counter:
    """(class, colour) of every image of every split."""
    found: Counter = Counter()
    for images in (data.train, data.validation, data.test):
        for pixels, label in zip(images.images, images.labels, strict=True):
            flat = pixels.flatten(1)
            assert bool((flat == flat[:, :1]).all())
            found[data.classes[int(label)], tuple(flat[:, 0].tolist())] += 1
    return found


def loaded(root: Path) -> Data:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_data(DataConfig(str(root)))


def check(tree: Tree) -> None:
    data = loaded(tree.root)
    truth = sum(tree.images.values(), Counter())
    assert read(data) == truth
    assert data.classes == sorted({name for name, _ in truth})
    assert data.note.isprintable()
    for split, images in tree.images.items():
        lacks = {name for name, _ in truth} - {name for name, _ in images}
        assert (f"{split}/ has no image of" in data.note) == bool(lacks)
    if tree.named:
        shown = [name for name in tree.named if printable(name) in data.note]
        assert min(5, len(tree.named)) <= len(shown) <= len(tree.named)
    else:
        assert "left out" not in data.note


@examples(40, 1000)
@given(steps=trees(), change=st.integers(0, 4), at=st.integers(0, 10**6))
def test_what_is_on_the_disk_is_what_is_read(steps: list[tuple], change: int, at: int) -> None:
    """By class and by picture; from the cache too, and after any change."""
    with tempfile.TemporaryDirectory() as base, pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEEDBACKWARD_CACHE", f"{base}/cache")
        tree = build(Path(base), steps)
        check(tree)
        check(tree)
        alter(tree, steps, change, at)
        check(tree)


def alter(tree: Tree, steps: list[tuple], change: int, at: int) -> None:
    """One change on the disk, and in the truth."""
    split, name, *_ = steps[at % len(steps)]
    folder, key = tree.root / split / name, unicodedata.normalize("NFC", name)
    if change == 0:
        tree.add_image(split, name, folder, "new{}", SUFFIXES[at % len(SUFFIXES)])
    elif change == 1:
        (folder / "new.heic").write_bytes(b"")
        tree.named.add(f"{split}/{name}/new.heic")
    elif change == 2:  # a class more
        (tree.root / split / "zzz").mkdir()
        for _ in range(4):
            tree.add_image(split, "zzz", tree.root / split / "zzz", "{}", ".png")
        if split != "train":
            (tree.root / "train" / "zzz").mkdir()
            tree.add_image("train", "zzz", tree.root / "train" / "zzz", "{}", ".png")
    elif change == 3:  # one picture in place of another, of the same size and time
        tree.add_image(split, name, folder, "old", ".bmp")
        stat = (folder / "old.bmp").stat()
        check(tree)
        colour = (250, tree.made % 16 * 16, 1)
        Image.new("RGB", (16, 16), colour).save(folder / "old.bmp")
        os.utime(folder / "old.bmp", ns=(stat.st_atime_ns, stat.st_mtime_ns))
        number = tree.made
        del tree.images[split][key, (number // 16 * 16, number % 16 * 16, 200)]
        tree.images[split][key, colour] += 1


def broken_link(root: Path) -> None:
    (root / "train" / "dog" / "lost.png").symlink_to(root / "nowhere.png")


def link_in_a_circle(root: Path) -> None:
    (root / "train" / "emu").symlink_to("emu")


def link_to_the_parent(root: Path) -> None:
    (root / "train" / "cat" / "up").symlink_to("..")


def link_to_the_root(root: Path) -> None:
    (root / "train" / "emu").symlink_to(root)


def deeper(root: Path) -> None:
    folder_of(root, "train/emu", {"images": 1})
    (root / "train" / "emu" / "images" / "round").symlink_to(root)


def flat(root: Path) -> None:
    Image.new("RGB", (8, 8)).save(root / "train" / "cat.png")


def elsewhere(root: Path) -> None:
    folder_of(root, "test", {"cat": 1, "dog": 1, "e\nmu": 1})


def broken(content: bytes) -> Callable[[Path], None]:
    def breaks(root: Path) -> None:
        (root / "train" / "cat" / "a\nb.png").write_bytes(content)

    return breaks


def too_large(root: Path) -> None:
    file = root / "train" / "cat" / "0.png"
    whole = file.read_bytes()
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + whole[24:29]
    file.write_bytes(whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:])


def same_class_twice(root: Path) -> None:
    (root / "train" / "kitten").symlink_to(root / "train" / "cat")


def split_is_a_link(root: Path) -> None:
    (root / "test").symlink_to(root / "train")


def two_forms(root: Path) -> None:
    for form in ("NFC", "NFD"):
        folder_of(root, "train", {unicodedata.normalize(form, "café"): 2})


def empty_class(root: Path) -> None:
    (root / "train" / "emu").mkdir()


def unreadable_class(root: Path) -> None:
    (root / "train" / "emu").mkdir()
    (root / "train" / "emu" / "a.heic").write_bytes(b"x")


def other_case(root: Path) -> None:
    folder_of(root, "test", {"Cat": 2, "dog": 2})


def not_utf8(root: Path) -> None:
    os.mkdir(os.fsencode(root / "train") + b"/caf\xe9")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (broken_link, r"lost\.png is a link to .*nowhere\.png, which is not there"),
        (link_in_a_circle, "emu is a link to emu, which is not there"),
        (link_to_the_parent, "up is a link to .*train, a folder that holds it: remove"),
        (link_to_the_root, "emu is a link to .*pets, a folder that holds it: remove"),
        (deeper, r"images/0\.png does not lie directly in a class folder"),
        (flat, r"train/cat\.png does not lie directly in a class folder"),
        (elsewhere, r"Class 'e\\nmu' .* has no training image \(it has images in test/\)"),
        (broken(b""), r"a\\nb\.png cannot be decoded: the file is empty"),
        (broken(b"<html>"), "cannot be decoded: it is no image of a format that Pillow reads"),
        (broken(b"version https://git-lfs.github.com/spec/v1"), "run git lfs pull"),
        (too_large, r"0\.png is larger than Pillow opens"),
        (same_class_twice, "'cat' and 'kitten' are the same folder"),
        (split_is_a_link, "'test' and 'train' are the same folder"),
        (two_forms, r"two folders for the class 'café'.*Unicode form"),
        (empty_class, "Class 'emu' .* has no training image"),
        (unreadable_class, r"no training image \(left out: train/emu/a\.heic, without the suffix"),
        (other_case, r"Class 'Cat' .* has no training image \('cat' is another class\)"),
        (not_utf8, r"caf\\xe9 is not UTF-8"),
    ],
)
def test_what_cannot_be_told_apart_or_read_is_refused(tmp_path, cache_folder, break_it, message):
    root = folder_of(tmp_path / "pets", "train", {"cat": 9, "dog": 9})
    break_it(root)
    with pytest.raises(DataError, match=message) as refused:
        load_data(DataConfig(str(root)))
    assert str(refused.value).isprintable()


def test_further_pictures_of_a_file_are_named(tmp_path: Path, cache_folder: Path) -> None:
    root = folder_of(tmp_path / "pets", "train", {"cat": 9, "dog": 9})
    pages = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (10, 20, 30)]
    pages[0].save(root / "train" / "cat" / "pages.tif", save_all=True, append_images=pages[1:])
    for _ in range(2):  # the second time from the cache
        with pytest.warns(RuntimeWarning, match=r"1 file holds several pictures.*pages\.tif"):
            data = load_data(DataConfig(str(root)))
        assert "several pictures" in data.note
    every = np.concatenate(
        [part.images.numpy() for part in (data.train, data.validation, data.test)]
    )
    assert len(every) == 19


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, cache_folder, monkeypatch):
    from feedbackward.experiment.data import dataset

    root = folder_of(tmp_path / "pets", "train", {"cat": 9, "dog": 9})
    whole = dataset.decode

    def slow(*arguments):
        decoded = whole(*arguments)
        Image.new("RGB", (8, 8)).save(root / "train" / "cat" / "3.png")
        return decoded

    monkeypatch.setattr(dataset, "decode", slow)
    with pytest.raises(DataError, match="changed while it was read"):
        load_data(DataConfig(str(root)))
    monkeypatch.undo()
    assert len(list(cache_folder.glob("*.safetensors"))) == 0
