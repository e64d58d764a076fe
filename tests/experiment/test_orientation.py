"""Photographs come out as they are to be seen, whatever the container that says so."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin, features

from feedbackward.experiment.data import DataConfig, load_data
from feedbackward.experiment.data.decode import image_to_array

# value -> what to do to the stored pixels [H, W, ...], from the table of the EXIF standard (2.32, tag 274):
# "6: the 0th row is the visual right-hand side, the 0th column is the visual top", and so on
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a.swapaxes(0, 1)[::-1],
}
INVERSE = {**{k: k for k in (1, 2, 3, 4, 5, 7)}, 6: 8, 8: 6}
QUARTERS = np.array([[250, 170], [90, 10]], np.uint8)
LOSSLESS: dict[str, dict[str, Any]] = {
    "PNG": {},
    "WEBP": {"lossless": True, "exact": True},
    "TIFF": {},
}
LOSSY: dict[str, dict[str, Any]] = {"JPEG": {"quality": 95}, "MPO": {"quality": 95}}
LOSSY |= {"WEBP": {"quality": 95}}
if features.check("avif"):
    LOSSY |= {"AVIF": {"quality": 95}}


def exif(value: int) -> Image.Exif:
    tags = Image.Exif()
    tags[274] = value
    return tags


def packed(pixels: np.ndarray, container: str, options: dict[str, Any], **more: Any) -> Image.Image:
    file = io.BytesIO()
    pages = {"save_all": True} if container == "MPO" else {}
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, container, **options, **pages, **more)
    return Image.open(io.BytesIO(file.getvalue()))


def stored(upright: np.ndarray, value: int) -> np.ndarray:
    return UPRIGHT[INVERSE[value]](upright)


@examples(150, 3000)
@given(
    container=st.sampled_from(sorted(LOSSLESS)),
    value=st.integers(1, 8),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    seed=st.integers(0, 999),
    gray=st.booleans(),
)
def test_every_pixel_comes_to_its_place(container, value, height, width, seed, gray) -> None:
    shape = (height, width) if gray else (height, width, 3)
    upright = np.random.RandomState(seed).randint(0, 256, shape, dtype=np.uint8)
    opened = packed(stored(upright, value), container, LOSSLESS[container], exif=exif(value))
    found = image_to_array(opened, "L" if gray and container != "WEBP" else "RGB", None)
    expected = upright[..., None] if gray else upright
    assert np.array_equal(
        found.transpose(1, 2, 0), np.broadcast_to(expected, found.shape[1:] + found.shape[:1])
    )


@examples(60, 500)
@given(
    container=st.sampled_from(sorted(LOSSY)),
    value=st.integers(1, 8),
    size=st.sampled_from([None, 8, 16, 40]),
)
def test_quarters_come_to_their_places(container, value, size) -> None:
    """Lossy containers, and decoding at a fraction of the scale."""
    upright = np.kron(QUARTERS, np.ones((32, 48), np.uint8))[..., None].repeat(3, 2)
    opened = packed(stored(upright, value), container, LOSSY[container], exif=exif(value))
    found = image_to_array(opened, "RGB", size)
    height, width = found.shape[1:]
    assert (height, width) == ((size, size) if size else (64, 96))
    middles = found[:, [height // 4, 3 * height // 4]][:, :, [width // 4, 3 * width // 4]]
    assert np.abs(middles.astype(int) - QUARTERS).max() < 30


PIXELS = {"PNG": ["L", "P", "RGB", "RGBA"], "TIFF": ["L", "P", "RGB", "RGBA", "CMYK"]}


@pytest.mark.parametrize("container", sorted(PIXELS))
def test_files_of_a_folder_come_upright(container: str, tmp_path: Path, cache_folder: Path) -> None:
    """Every mode that a container stores, each turned in every way; a class is a picture."""
    upright, modes = np.kron(QUARTERS, np.ones((4, 6), np.uint8)), PIXELS[container]
    for value, mode in itertools.product(range(1, 9), modes):
        shades = Image.fromarray(np.ascontiguousarray(stored(upright, value)))
        picture = (shades if mode in "LP" else shades.convert("RGB")).convert(mode)
        (tmp_path / "set" / "train" / f"{mode} {value}").mkdir(parents=True)
        for number in range(4):
            file = tmp_path / "set" / "train" / f"{mode} {value}" / f"{number}.{container.lower()}"
            picture.save(file, container, exif=exif(value))
    data = load_data(DataConfig(str(tmp_path / "set"), size=16))
    shown = torch.cat([part.images for part in (data.train, data.validation, data.test)])
    middles = shown[:, :, [4, 12]][:, :, :, [4, 12]].int() - torch.from_numpy(QUARTERS).int()
    assert len(shown) == 32 * len(modes)
    assert int(middles.abs().max()) < 30


def xmp(value: int) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", f'<rdf:Description tiff:Orientation="{value}"/>')
    return info


def raw_profile(value: int) -> PngImagePlugin.PngInfo:
    data = exif(value).tobytes()
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", f"\nexif\n{len(data):8d}\n{data.hex()}\n")
    return info


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("written", [xmp, raw_profile])
def test_other_ways_to_say_it(written, value) -> None:
    upright = np.random.RandomState(value).randint(0, 256, (5, 7, 3), dtype=np.uint8)
    opened = packed(stored(upright, value), "PNG", {}, pnginfo=written(value))
    assert np.array_equal(image_to_array(opened, "RGB", None).transpose(1, 2, 0), upright)


@pytest.mark.parametrize("container", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    "metadata", [b"Exif\0\0garbage!", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", 0, 9, 250]
)
def test_metadata_without_sense_leaves_the_picture_alone(container, metadata) -> None:
    pixels = np.full((6, 4, 3), 99, np.uint8)
    tags = exif(metadata) if isinstance(metadata, int) else metadata
    found = image_to_array(packed(pixels, container, {}, exif=tags), "RGB", None)
    assert found.shape == (3, 6, 4)
