"""The embedded selection of Fashion-MNIST: no download, no cache."""

from importlib import resources

import numpy as np
import torch
from PIL import Image

from feedbackward.experiment.data.decode import Decoded, Images, image_to_array

SIDE, CLASSES = 28, 10
NAMES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"]
NAMES += ["Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def fashion_mini(size: int | None) -> Decoded:
    """4,000 training and 1,000 test images, gray, 28 x 28 (or size x size); labels cycle through 0 to 9."""
    return Decoded({split: _read(split, size) for split in ("train", "test")}, list(NAMES))


def _read(split: str, size: int | None) -> Images:
    """Cut a sheet, on which the images of one class follow each other, into images [N, 1, H, W]."""
    with (
        resources.files("feedbackward")
        .joinpath(f"experiment/data/embedded/{split}.png")
        .open("rb") as file
    ):
        sheet = np.asarray(Image.open(file))
    rows, columns = sheet.shape[0] // SIDE, sheet.shape[1] // SIDE
    by_class = (
        sheet.reshape(rows, SIDE, columns, SIDE)
        .transpose(0, 2, 1, 3)
        .reshape(CLASSES, -1, SIDE, SIDE)
    )
    pixels = by_class.transpose(1, 0, 2, 3).reshape(-1, 1, SIDE, SIDE)
    if size is not None:
        pixels = np.stack(
            [image_to_array(Image.fromarray(image[0]), "L", size) for image in pixels]
        )
    labels = torch.arange(CLASSES).repeat(by_class.shape[1])
    return Images(torch.from_numpy(pixels.copy()), labels)
