"""Make the embedded data set: two PNG sheets of Fashion-MNIST images, class by class.

    python tools/make_embedded.py DATA_ROOT

`DATA_ROOT/zalando-datasets/fashion_mnist` holds the whole data set in the hub's layout. The first 400 images
of each class of the official training split and the first 100 of each class of the official test split are
taken, in official order. A sheet shows COLUMNS images to the row, all of class 0 first, so no label file is
needed. As PNG the 5,000 images take 1.96 MB (LZMA 1.85 MB, zlib 2.14 MB), and anyone can look at them.
"""

import argparse
from pathlib import Path

import numpy as np
from datasets import load_dataset
from PIL import Image

TARGET = Path(__file__).parents[1] / "src/feedbackward/experiment/data/embedded"
PER_CLASS = {"train": 400, "test": 100}
COLUMNS, CLASSES, SIDE = 50, 10, 28


def sheet(rows: list[np.ndarray]) -> np.ndarray:
    """Images [SIDE, SIDE] in reading order -> one gray sheet [SIDE * len / COLUMNS, SIDE * COLUMNS]."""
    grid = np.stack(rows).reshape(-1, COLUMNS, SIDE, SIDE)
    return grid.transpose(0, 2, 1, 3).reshape(-1, COLUMNS * SIDE)


def main() -> None:
    """Write train.png and test.png beside the package's code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data_root", type=Path)
    folder = parser.parse_args().data_root / "zalando-datasets/fashion_mnist"
    for split, rows in load_dataset(str(folder), streaming=True).items():
        chosen: list[list[np.ndarray]] = [[] for _ in range(CLASSES)]
        for row in rows:
            if len(chosen[row["label"]]) < PER_CLASS[split]:
                chosen[row["label"]].append(np.asarray(row["image"]))
        pixels = sheet([image for images in chosen for image in images])
        target = TARGET / f"{split}.png"
        Image.fromarray(pixels).save(target, optimize=True)
        print(f"{target}: {pixels.shape[1]} x {pixels.shape[0]}, {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
