"""Data that is missing, damaged or does not fit: one clear error with the fix."""

import shutil

import numpy as np
import pytest
from data_files import cifar100_root, config, folder_of, numbered, png, write_split
from PIL import Image

from feedbackward.errors import ConfigError, DataError
from feedbackward.experiment.data.dataset import DATASETS, DataConfig, load_data

pytestmark = pytest.mark.usefixtures("cache_folder")


@pytest.fixture
def root(tmp_path):
    return cifar100_root(tmp_path / "root")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "cifar01"}, "did you mean cifar10"),
        ({"name": "imagenet-22k-full"}, "choose one of fashion-mini"),
        ({"augment": "crpo"}, "none, flip, crop, crop-flip"),
        ({"classes": 11}, "classes is 11, but 'fashion-mini' has 10 classes"),
        ({"classes": 1}, "classes is 1: it must be at least 2"),
        ({"train_limit": 0}, "train_limit is 0"),
        ({"validation": 4000}, "Holding out 4000 images leaves none of the 4000"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        load_data(DataConfig(**options))


def test_missing_folders(tmp_path):
    with pytest.raises(DataError, match="no image folder"):
        load_data(DataConfig(str(tmp_path / "nowhere")))
    with pytest.raises(DataError, match="does not exist; fetch it with `hf download"):
        load_data(config(tmp_path / "nowhere"))
    (tmp_path / DATASETS["cifar100"].hub_id).mkdir(parents=True)
    with pytest.raises(DataError, match="has no parquet files"):
        load_data(config(tmp_path))
    with pytest.raises(DataError, match=r"has no train/"):
        load_data(DataConfig(str(tmp_path)))
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match="holds no images"):
        load_data(DataConfig(str(tmp_path)))


def test_missing_split_and_column(root, tmp_path):
    data_folder = root / DATASETS["cifar100"].hub_id / "data"
    (data_folder / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(DataError, match="has no split 'test', only train"):
        load_data(config(root))
    path = write_split(tmp_path / "other", "train", [(png(numbered(0)), 0)], "cifar10", 10)
    target = tmp_path / "other" / DATASETS["cifar100"].hub_id / "data" / path.name
    target.parent.mkdir(parents=True)
    shutil.copy(path, target)
    shutil.copy(path, target.with_name("test-00000-of-00001.parquet"))
    with pytest.raises(DataError, match="no column 'fine_label', only img, label"):
        load_data(config(tmp_path / "other"))


@pytest.mark.parametrize("damage", ["truncate", "middle"])
def test_damaged_parquet(root, damage):
    path = root / DATASETS["cifar100"].hub_id / "data" / "train-00000-of-00001.parquet"
    whole = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(whole[: len(whole) // 2])
    else:
        path.write_bytes(whole[:4] + b"\xff" * (len(whole) // 2) + whole[4 + len(whole) // 2 :])
    with pytest.raises(DataError, match="truncated"):
        load_data(config(root))


def test_corrupt_image(root, tmp_path):
    cut = png(numbered(1))
    rows = [(png(numbered(0)), 0), ({"bytes": cut["bytes"][:60], "path": None}, 1)]
    write_split(root, "test", rows)
    with pytest.raises(DataError, match=r"Image 1 of split test .* cannot be decoded"):
        load_data(config(root))
    base = folder_of(tmp_path / "pets", "train", {"cat": 9, "dog": 9})
    broken = base / "train" / "dog" / "3.png"
    broken.write_bytes(b"not a picture")
    with pytest.raises(DataError, match=f"{broken} cannot be decoded"):
        load_data(DataConfig(str(base)))


def test_deep_image_and_16_bit_and_nested(tmp_path):
    base = folder_of(tmp_path / "pets", "train", {"cat": 9, "dog": 9})
    deep = base / "train" / "dog" / "deep.png"
    Image.fromarray(np.full((8, 8), 1000, np.uint16)).save(deep)
    with pytest.raises(DataError, match="more than 8 bits"):
        load_data(DataConfig(str(base)))
    (base / "train" / "dog" / "inner").mkdir()
    deep.rename(base / "train" / "dog" / "inner" / "deep.png")
    with pytest.raises(DataError, match="one level of class folders"):
        load_data(DataConfig(str(base)))


def test_labels_that_do_not_fit(tmp_path):
    cell = png(numbered(0))
    whole = [(cell, i) for i in range(100)]
    write_split(tmp_path, "train", whole, classes=None)
    write_split(tmp_path, "test", [(cell, 3), (cell, 100)], classes=None)
    with pytest.raises(DataError, match=r"Image 1 of split test .* label 100, outside 0 to 99"):
        load_data(config(tmp_path))
    write_split(tmp_path, "test", [(cell, -1)], classes=None)
    with pytest.raises(DataError, match="label -1"):
        load_data(config(tmp_path))
    write_split(tmp_path, "test", [(cell, None)], classes=None)
    with pytest.raises(DataError, match=r"Image 0 of split test .* has no label"):
        load_data(config(tmp_path))


def test_class_count_that_does_not_match(tmp_path):
    cell = png(numbered(0))
    write_split(tmp_path, "train", [(cell, 0)], classes=20)
    write_split(tmp_path, "test", [(cell, 0)], classes=20)
    with pytest.raises(DataError, match="has 20 classes where 100 belong"):
        load_data(config(tmp_path))


def test_class_without_training_images(tmp_path):
    base = folder_of(tmp_path / "pets", "train", {"cat": 9, "dog": 9})
    folder_of(base, "test", {"cat": 2, "emu": 2})
    with pytest.raises(DataError, match=r"Class 'emu' of .* has no training image"):
        load_data(DataConfig(str(base)))
    lonely = folder_of(tmp_path / "lonely", "train", {"cat": 9})
    with pytest.raises(DataError, match="has 1 class: give at least two"):
        load_data(DataConfig(str(lonely)))


def test_test_images_of_another_size(tmp_path):
    base = folder_of(tmp_path / "pets", "train", {"cat": 9, "dog": 9})
    folder_of(base, "test", {"cat": 2, "dog": 2}, side=9)
    with pytest.raises(DataError, match=r"9 x 9 pixels, train of 8 x 8: set size="):
        load_data(DataConfig(str(base)))


def test_no_network_says_what_to_do(monkeypatch):
    import datasets

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"Couldn't reach the hub.*--data-root.*fashion-mini"):
        load_data(DataConfig("cifar10"))
