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


@pytest.mark.parametrize("train", ["train", "Train", "training"])
@pytest.mark.parametrize("validation", ["val", "valid", "dev", "Validation", "eval", "VAL"])
@pytest.mark.parametrize("test", ["test", "Testing", None])
def test_every_name_of_a_split_is_used(
    tmp_path: Path, cache_folder: Path, train: str, validation: str, test: str | None
) -> None:
    names = {"train": train, "validation": validation} | ({"test": test} if test else {})
    data = load_data(DataConfig(name=str(folder(tmp_path / "animals", names))))
    tested = "test" if test else "validation"
    assert len(data.test.labels) == 2 * COUNTS[tested]
    if test:
        assert len(data.train.labels) == 2 * COUNTS["train"]
        assert len(data.validation.labels) == 2 * COUNTS["validation"]


def test_two_folders_of_one_split_are_refused(tmp_path: Path) -> None:
    root = folder(tmp_path / "animals", {"train": "train", "validation": "val"})
    folder(root, {"validation": "valid"})
    with pytest.raises(DataError, match="two folders for the validation split, val/ and valid/"):
        load_data(DataConfig(name=str(root)))
