"""Data sets: what is read, how it is split, what is cached."""

import io
import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import cifar100_root, config, folder_of, number, numbered, png, write_split
from PIL import Image

from feedbackward.errors import ConfigError, DataError
from feedbackward.experiment.data import cache
from feedbackward.experiment.data import dataset as data
from feedbackward.experiment.data.dataset import DataConfig, load_data
from feedbackward.experiment.data.decode import decode
from feedbackward.experiment.data.decode_progress import Progress
from feedbackward.experiment.data.fashion_mini import fashion_mini
from feedbackward.experiment.data.sources import find_source

REAL = Path(os.environ.get("FEEDBACKWARD_DATA", Path(__file__).parents[2] / "shared" / "data"))


pytestmark = pytest.mark.usefixtures("cache_folder")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return cifar100_root(tmp_path_factory.mktemp("root"))


@pytest.fixture
def root(written, tmp_path):
    return Path(shutil.copytree(written, tmp_path / "root"))


# what is read


def test_hub_layout_is_read_exactly(written):
    loaded = load_data(config(written))
    assert loaded.shape == (3, 8, 8)
    assert loaded.classes == [f"class {i}" for i in range(100)]
    assert (len(loaded.train), len(loaded.validation), len(loaded.test)) == (
        300 - 300 // 8,
        300 // 8,
        100,
    )
    for images in (loaded.train, loaded.validation, loaded.test):
        assert images.images.dtype == torch.uint8
        assert images.labels.dtype == torch.int64
        for image, label in zip(images.images, images.labels, strict=True):
            index = number(image)
            assert label == index % 100
            assert np.array_equal(image.permute(1, 2, 0).numpy(), numbered(index))
    assert "train is only 300 of the 50,000 official images" in loaded.note
    assert "test is only 100 of the 10,000 official images" in loaded.note


def test_splits_are_disjoint_and_complete(written):
    loaded = load_data(config(written, validation=60))
    train, validation, test = (
        {number(image) for image in images.images}
        for images in (loaded.train, loaded.validation, loaded.test)
    )
    assert (len(train), len(validation)) == (240, 60)
    assert train | validation == set(range(300))
    assert test == set(range(300, 400))


def test_split_is_fixed_and_the_limit_leaves_validation_alone(written):
    torch.manual_seed(1)
    first = load_data(config(written))
    torch.manual_seed(2)
    np.random.seed(3)
    again, limited = load_data(config(written)), load_data(config(written, train_limit=40))
    assert torch.equal(first.train.images, again.train.images)
    assert torch.equal(first.validation.images, limited.validation.images)
    assert torch.equal(first.train.images[:40], limited.train.images)
    assert len(load_data(config(written, train_limit=10**6)).train) == len(first.train)
    few = load_data(config(written, test_limit=7)).test
    assert [number(i) for i in few.images] == [number(i) for i in first.test.images[:7]]


def test_first_classes(written):
    loaded = load_data(config(written, classes=7))
    assert loaded.num_classes == 7
    assert len(loaded.train) + len(loaded.validation) == 3 * 7
    assert sorted(loaded.test.labels.tolist()) == list(range(7))


def test_mean_and_std_are_those_of_the_training_split(written):
    loaded = load_data(config(written))
    pixels = loaded.train.images.numpy().astype(np.float64) / 255
    assert loaded.mean == pytest.approx(pixels.mean((0, 2, 3)), rel=1e-12)
    assert loaded.std == pytest.approx(pixels.std((0, 2, 3)), rel=1e-12)


def test_embedded_set():
    loaded = load_data(DataConfig())
    assert (len(loaded.train), len(loaded.validation), len(loaded.test)) == (3500, 500, 1000)
    assert loaded.shape == (1, 28, 28)
    pool = torch.cat([loaded.train.labels, loaded.validation.labels])
    assert pool.bincount().tolist() == [400] * 10
    assert loaded.test.labels.bincount().tolist() == [100] * 10
    # a leading batch is a sample of all classes
    assert loaded.test.labels[:100].unique().tolist() == list(range(10))
    assert load_data(DataConfig(size=32)).shape == (1, 32, 32)
    folder = Path(data.__file__).parent / "embedded"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 3e6
    assert "Zalando SE" in (folder / "LICENSE").read_text()


@pytest.mark.slow
@pytest.mark.skipif(
    not (REAL / "zalando-datasets").is_dir(), reason="no local copy of Fashion-MNIST"
)
def test_embedded_set_is_a_selection_of_the_real_one():
    real = decode(find_source("fashion-mnist", str(REAL)), None)
    mini = fashion_mini(None)
    assert (len(real.splits["train"]), len(real.splits["test"])) == (60_000, 10_000)
    for split, count in (("train", 400), ("test", 100)):
        for label in range(10):
            first = (real.splits[split].labels == label).nonzero().flatten()[:count]
            ours = mini.splits[split].images[mini.splits[split].labels == label]
            assert torch.equal(ours, real.splits[split].images[first])
    mean = real.splits["train"].images.double().mean().item() / 255
    assert mean == pytest.approx(0.2860, abs=1e-4)  # the figure everybody uses


def test_tiny_imagenet_tests_on_valid_and_makes_gray_images_rgb(tmp_path):
    gray = [(png(numbered(i, mode="L")), i) for i in range(200)]
    colour = [(png(numbered(i)), i % 200) for i in range(200, 400)]
    write_split(tmp_path, "train", gray + colour, "tiny-imagenet", 200)
    write_split(tmp_path, "valid", colour[:50], "tiny-imagenet", 200)
    loaded = load_data(DataConfig("tiny-imagenet", root=str(tmp_path)))
    assert len(loaded.test) == 50
    assert loaded.shape == (3, 8, 8)
    was_gray = [image for image in loaded.train.images if number(image) < 200]
    assert was_gray
    for image in was_gray:
        assert torch.equal(
            image, torch.from_numpy(numbered(number(image), mode="L")).expand(3, 8, 8)
        )
    assert "validation split" in loaded.note


def test_size_resizes_every_image(tmp_path):
    flat = np.full((12, 6, 3), 77, np.uint8)
    rows = [(png(flat), i) for i in range(100)] + [(png(numbered(i)), i) for i in range(100)]
    write_split(tmp_path, "train", rows)
    write_split(tmp_path, "test", rows)
    with pytest.raises(DataError, match=r"8 x 8 pixels, others 6 x 12: set size="):
        load_data(config(tmp_path))
    loaded = load_data(config(tmp_path, size=10))
    assert loaded.shape == (3, 10, 10)
    assert (
        sum(bool((image == 77).all()) for image in loaded.test.images) == 100
    )  # a flat image stays flat


def test_the_hub_gives_what_the_folder_gives(written, tmp_path, monkeypatch, cache_folder):
    """The hub is stood in for by an ordinary (not streamed) load of the same files."""
    import datasets

    def download(hub_id, _load=datasets.load_dataset):
        return _load(str(written / hub_id), cache_dir=str(tmp_path / "hub"))

    offline = load_data(config(written))
    monkeypatch.setattr(datasets, "load_dataset", download)
    online = load_data(DataConfig("cifar100"))
    assert torch.equal(offline.train.images, online.train.images)
    assert torch.equal(offline.test.labels, online.test.labels)
    assert len(list(cache_folder.glob("*.safetensors"))) == 2


def test_no_network_with_a_root(written, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert len(load_data(config(written)).test) == 100


# image folders


def test_image_folder_with_awkward_names(tmp_path):
    base = folder_of(tmp_path / "my [set]", "train", {"train": 8, "test dog": 9, "[x]": 10})
    folder_of(base, "test", {"train": 1, "test dog": 2, "[x]": 3})
    (base / "train" / "train" / "notes.txt").write_text("not an image")
    (base / "train" / "metadata.csv").write_text("file_name,label\n")
    (base / "train" / ".ipynb_checkpoints").mkdir()
    shutil.copy(base / "train" / "train" / "0.png", base / "train" / ".ipynb_checkpoints" / "0.png")
    loaded = load_data(DataConfig(str(base), validation=5))
    assert loaded.classes == ["[x]", "test dog", "train"]
    assert (len(loaded.train), len(loaded.validation), len(loaded.test)) == (27 - 5, 5, 6)
    assert loaded.test.labels.bincount().tolist() == [3, 2, 1]


def test_image_folder_splits(tmp_path):
    base = folder_of(tmp_path / "pets", "train", {"cat": 20, "dog": 20})
    held_out = load_data(DataConfig(str(base)))
    assert (len(held_out.train), len(held_out.validation), len(held_out.test)) == (31, 4, 5)
    assert "test is 5 images held out of train" in held_out.note
    every = torch.cat(
        [part.labels for part in (held_out.train, held_out.validation, held_out.test)]
    )
    assert every.bincount().tolist() == [20, 20]
    folder_of(base, "validation", {"cat": 3, "dog": 3})
    assert len(load_data(DataConfig(str(base))).test) == 6
    folder_of(base, "test", {"cat": 4, "dog": 4})
    whole = load_data(DataConfig(str(base)))
    assert (len(whole.train), len(whole.validation), len(whole.test)) == (40, 6, 8)
    with pytest.raises(ConfigError, match="folder of validation images"):
        load_data(DataConfig(str(base), validation=3))


def test_photographs_are_turned_upright(tmp_path):
    base = folder_of(tmp_path / "photos", "train", {"cat": 9, "dog": 9})
    sideways = np.zeros((8, 8, 3), np.uint8)
    sideways[:, :4] = 255  # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn clockwise by 90 degrees": the left half becomes the upper half
    (base / "test" / "dog").mkdir(parents=True)
    Image.fromarray(sideways).save(base / "test" / "dog" / "0.JPG", exif=exif, quality=95)
    image = load_data(DataConfig(str(base))).test.images[0].float()
    assert image[:, :3].mean() > 250
    assert image[:, 5:].mean() < 5


# the cache


def forbid_decoding(monkeypatch):
    def fail(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr(data, "decode", fail)


def test_second_load_comes_from_the_cache(root, cache_folder, monkeypatch):
    first = load_data(config(root))
    kept = sorted(path.name for path in cache_folder.iterdir())
    assert [Path(name).suffix for name in kept] == [".safetensors", ".sha256"]
    forbid_decoding(monkeypatch)
    again = load_data(config(root))
    assert torch.equal(first.train.images, again.train.images)
    assert torch.equal(first.test.labels, again.test.labels)
    assert first.classes == again.classes
    with pytest.raises(AssertionError, match="decoded again"):
        load_data(config(root, size=9))


@pytest.mark.parametrize(
    "damage", ["flip", "truncate", "empty", "no digest", "no data", "garbled digest"]
)
def test_damaged_cache_is_rebuilt(root, cache_folder, monkeypatch, damage):
    first = load_data(config(root))
    kept = next(cache_folder.glob("*.safetensors"))
    whole = kept.read_bytes()
    if damage == "flip":
        kept.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage == "truncate":
        kept.write_bytes(whole[: len(whole) // 2])
    elif damage == "empty":
        kept.write_bytes(b"")
    elif damage == "garbled digest":
        kept.with_suffix(".sha256").write_bytes(b"\xff\xfe")
    else:
        (kept if damage == "no data" else kept.with_suffix(".sha256")).unlink()
    if damage in ("no digest", "no data"):
        again = load_data(config(root))
    else:
        with pytest.warns(RuntimeWarning, match="decoding again"):
            again = load_data(config(root))
    assert torch.equal(first.train.images, again.train.images)
    assert kept.read_bytes() == whole
    forbid_decoding(monkeypatch)
    load_data(config(root))


def test_changed_source_replaces_the_cache(root, cache_folder):
    load_data(config(root))
    write_split(root, "test", [(png(numbered(i)), i % 100) for i in range(500, 600)])
    assert {number(image) for image in load_data(config(root)).test.images} == set(range(500, 600))
    assert len(list(cache_folder.iterdir())) == 2


def test_unwritable_cache_only_warns(root, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FEEDBACKWARD_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(RuntimeWarning, match="set FEEDBACKWARD_CACHE to a writable folder"):
        assert len(load_data(config(root)).test) == 100


def test_cache_folder_follows_xdg(monkeypatch):
    monkeypatch.delenv("FEEDBACKWARD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache.cache_folder() == Path("/somewhere/feedbackward")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_folder() == Path.home() / ".cache" / "feedbackward"


def test_progress_only_on_a_terminal_and_only_when_slow(monkeypatch):
    class Clock:
        now = 0.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr("feedbackward.experiment.data.decode_progress.time", clock)
    for terminal, seconds, shown in ((False, 9, False), (True, 1, False), (True, 3, True)):
        monkeypatch.setattr("sys.stderr", io.StringIO())
        monkeypatch.setattr("sys.stderr.isatty", lambda terminal=terminal: terminal, raising=False)
        with Progress("Decoding", 10) as progress:
            clock.now += seconds
            progress.advance(5)
            assert (progress.bar is not None) == shown
