"""Small data sets on disk, in the layouts that the experiment layer reads."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from feedbackward.experiment.data.dataset import DATASETS, DataConfig


def numbered(index: int, side: int = 8, mode: str = "RGB") -> np.ndarray:
    """An image whose first two pixels say its number, the rest is noise of its own."""
    channels = () if mode == "L" else (3,)
    pixels = np.random.RandomState(index).randint(0, 256, (side, side, *channels), dtype=np.uint8)
    pixels[0, 0], pixels[0, 1] = index // 256, index % 256
    return pixels


def number(image: torch.Tensor) -> int:
    return int(image[0, 0, 0]) * 256 + int(image[0, 0, 1])


def png(pixels: np.ndarray) -> dict:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def write_split(root, split, rows, name="cifar100", classes=100):
    """One split in the hub's layout: `rows` are (image cell, label); classes=None writes bare integers."""
    import datasets

    spec = DATASETS[name]
    label = (
        datasets.ClassLabel(names=[f"class {i}" for i in range(classes)])
        if classes
        else datasets.Value("int64")
    )
    columns = {spec.image: [cell for cell, _ in rows], spec.label: [label for _, label in rows]}
    features = datasets.Features({spec.image: datasets.Image(), spec.label: label})
    path = root / spec.hub_id / "data" / f"{split}-00000-of-00001.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
    return path


def config(root, **options) -> DataConfig:
    return DataConfig("cifar100", root=str(root), **options)


def folder_of(base: Path, split: str, counts: dict[str, int], side=8) -> Path:
    """`base/split/<class>/*.png` with so many images of each class."""
    for name, count in counts.items():
        (base / split / name).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(numbered(index, side)).save(base / split / name / f"{index}.png")
    return base


def cifar100_root(root: Path) -> Path:
    """CIFAR-100's layout: 300 training images (label = number % 100) and 100 test images (numbers from 300)."""
    write_split(root, "train", [(png(numbered(i)), i % 100) for i in range(300)])
    write_split(root, "test", [(png(numbered(i)), i % 100) for i in range(300, 400)])
    return root
