"""Folders of images: the names that people give to the splits."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from feedbackward.errors import DataError
from feedbackward.experiment.data import DataConfig, load_data

COUNTS = {"train": 6, "validation": 3, "test": 2}


def folder(root: Path, names: dict[str, str]) -> Path:
    for split, name in names.items():
        for label, colour in (("cat", 40), ("dog", 200)):
            place = root / name / label
            place.mkdir(parents=True)
            for i in range(COUNTS[split]):
                Image.new("RGB", (8, 8), (colour, i, i)).save(place / f"{i}.png")
    return root


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [
        ("Train", "val", "TEST"),
        ("training", "valid", "Testing"),
        ("training_set", "dev", "test_set"),
        ("training set", "VAL", "test-images"),
        ("trainset", "validation-set", "tests"),
        ("train_data", "Evaluation", "tst"),
        ("train", "eval", None),
    ],
)
def test_every_name_of_a_split_is_used(
    tmp_path: Path, cache_folder: Path, train: str, validation: str, test: str | None
) -> None:
    names = {"train": train, "validation": validation} | ({"test": test} if test else {})
    data = load_data(DataConfig(name=str(folder(tmp_path / "animals", names))))
    tested = "test" if test else "validation"
    assert len(data.test.labels) == 2 * COUNTS[tested]
    assert ("there is no test folder" in data.note) == (test is None)
    if test:
        assert len(data.train.labels) == 2 * COUNTS["train"]
        assert len(data.validation.labels) == 2 * COUNTS["validation"]


def test_two_folders_of_one_split_are_refused(tmp_path: Path) -> None:
    root = folder(tmp_path / "animals", {"train": "train", "validation": "val"})
    folder(root, {"validation": "valid"})
    with pytest.raises(DataError, match="two folders for the validation split, val/ and valid/"):
        load_data(DataConfig(name=str(root)))


def test_a_plain_name_comes_before_another(tmp_path: Path, cache_folder: Path) -> None:
    root = folder(tmp_path / "animals", {"train": "train", "validation": "train_images"})
    with pytest.warns(RuntimeWarning, match=r"left out: train_images/ \(neither train"):
        data = load_data(DataConfig(name=str(root)))
    assert len(data.train.labels) + len(data.validation.labels) + len(data.test.labels) == 12


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"train": "pets/train"}, "did you mean .*/animals/pets"),
        ({"train": "."}, "put the images in train/<class>/, where now there are cat, dog"),
        ({"test": "test"}, "put the images in train/<class>/, where now there are test"),
    ],
)
def test_a_folder_without_train_says_what_it_holds(tmp_path, names, message) -> None:
    root = folder(tmp_path / "animals", names)
    with pytest.raises(DataError, match=f"has no train/: {message}"):
        load_data(DataConfig(name=str(root)))
