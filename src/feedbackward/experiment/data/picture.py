"""A picture as a function: the colour of each pixel, by where it is."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from feedbackward.errors import ConfigError, DataError
from feedbackward.experiment.config.data import DataConfig
from feedbackward.experiment.data.named import file_digest, find_file, refuse_options
from feedbackward.experiment.data.splits import Pairs, SplitData, split_order

EMBEDDED = "picture"
SIDE = 64


def load_picture(config: DataConfig) -> SplitData:
    """A picture of `config.size` (64) pixels a side: half of its pixels to train on, a quarter held out, a quarter to test on.

    Inputs are places [n, 2], from -1 to 1 down and to the right, and targets colours [n, 3], from 0 to 1, less the mean colour of the
    pixels to train on: feedback that learns from the first errors would learn little else. PSNR is that of the colours. The split is
    drawn, in a fixed random order. The picture is the embedded one or that of an image file.
    Raises DataError for a file that is missing or no image, and ConfigError for an option that is not of pictures.
    """
    refuse_options(config, "a picture", "classes", "augment", "tokens", "context")
    side = SIDE if config.size is None else config.size
    if side < 4:
        raise ConfigError(f"data.size is {side}: a picture needs at least 4 pixels a side")
    pixels = drawn(side) if config.name == EMBEDDED else _read(_file(config), side)
    along = (torch.arange(side, dtype=torch.float32) + 0.5) * 2 / side - 1
    places = torch.cartesian_prod(along, along)
    whole = Pairs(places, pixels.reshape(-1, 3))
    order = torch.from_numpy(split_order(len(whole)))
    half, quarter = len(whole) // 2, len(whole) // 4
    parts = order[:half], order[half : half + quarter], order[half + quarter :]
    limits = (config.train_limit, config.validation, config.test_limit)
    taken = [whole.take(part.long()[:limit]) for part, limit in zip(parts, limits, strict=True)]
    mean = taken[0].targets.mean(0)
    train, validation, test = (Pairs(part.inputs, part.targets - mean) for part in taken)
    form = {
        "side": side,
        "input": "places from -1 to 1, down and to the right",
        "mean_colour": mean.tolist(),
    }
    colours = ["red", "green", "blue"]
    return SplitData(config.name, train, validation, test, colours, (2,), form)


def fingerprint_picture(config: DataConfig) -> str:
    """A digest that is another as soon as the file has changed. Raises as `load_picture` does."""
    return EMBEDDED if config.name == EMBEDDED else file_digest(_file(config))


def drawn(side: int) -> Tensor:
    """The embedded picture [side, side, 3]: a smooth sky, two discs with sharp edges, and stripes that get finer."""
    along = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    y, x = torch.meshgrid(along, along, indexing="ij")
    wave = 0.5 + 0.5 * torch.sin(2 * math.pi * (x + 0.3 * torch.sin(2 * math.pi * y)))
    picture = torch.stack([0.3 + 0.5 * y, 0.2 + 0.6 * wave * (1 - y), 0.8 - 0.5 * x * y], -1)
    for middle, radius, colour in (
        ((0.32, 0.35), 0.2, (0.95, 0.85, 0.2)),
        ((0.6, 0.68), 0.14, (0.1, 0.2, 0.5)),
    ):
        inside = (y - middle[0]).square() + (x - middle[1]).square() < radius**2
        picture[inside] = torch.tensor(colour, dtype=torch.float64)
    stripes = torch.sin(2 * math.pi * (2 + 5 * x) * x) > 0
    picture[stripes & (y > 0.8)] = torch.tensor((0.9, 0.3, 0.25), dtype=torch.float64)
    return picture.float()


def _file(config: DataConfig) -> Path:
    if not Path(config.name).suffix:
        raise ConfigError(
            f"data.name is '{config.name}': a regression needs '{EMBEDDED}', which is embedded, or the path of an image file"
        )
    return find_file(config, {}, "image")


def _read(path: Path, side: int) -> Tensor:
    """An image file as [side, side, 3] from 0 to 1."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            small = image.convert("RGB").resize((side, side), Image.Resampling.BOX)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the image {path}: {error}") from error
    return torch.from_numpy(np.asarray(small, np.float32) / 255)
