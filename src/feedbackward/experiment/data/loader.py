"""Batches on the training device: shuffled, augmented and normalised, the same after a resume."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from feedbackward.errors import ConfigError
from feedbackward.experiment.data.decode import Images
from feedbackward.experiment.imported import imported
from feedbackward.experiment.randomness import random_numbers_of

if TYPE_CHECKING:
    from feedbackward.experiment.data.dataset import Data

AUGMENTATIONS = ("none", "flip", "crop", "crop-flip")


def find_transform(augment: str) -> Callable[[Tensor], Any] | None:
    """The user's own transform of one image, `package.module:name` or `path/to/file.py:name`; None for AUGMENTATIONS.

    A class, such as those of `torchvision.transforms.v2`, is made without arguments. Raises ConfigError if there is none.
    """
    if augment in AUGMENTATIONS:
        return None
    if ":" not in augment:
        raise ConfigError(
            f"Unknown augment '{augment}': choose one of {', '.join(AUGMENTATIONS)}; or package.module:name for your own, "
            "for example torchvision.transforms.v2:TrivialAugmentWide."
        )
    found = imported(augment, "augmentation")
    try:
        transform = found() if isinstance(found, type) else found
    except TypeError as error:
        raise ConfigError(
            f"the augmentation {augment!r} cannot be made without arguments ({error}): name an object that is made"
        ) from error
    if not callable(transform):
        raise ConfigError(
            f"the augmentation {augment!r} is a {type(transform).__name__}: expected a function of one image, or a class of such"
        )
    return transform


class Batches(ABC):
    """Batches of a split, whose order depends only on (seed, epoch): a resumed run sees the same.

    While shuffling (training), a last batch of a single row is dropped, because batch norm has no variance to compute from
    it; without shuffling (evaluation) every row is kept.
    """

    def __init__(
        self,
        examples: Any,
        batch_size: int,
        *,
        device: str | torch.device = "cpu",
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}: it must be at least 1.")
        self.examples, self.batch_size, self.device = examples, batch_size, torch.device(device)
        self.seed, self.shuffle = seed, shuffle

    def __len__(self) -> int:
        """Batches per epoch."""
        whole, rest = divmod(len(self.examples), self.batch_size)
        return whole + (rest > 1 or (rest == 1 and not self.shuffle))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches `start`, `start` + 1, ... of an epoch: inputs and targets."""
        order = torch.arange(len(self.examples))
        if self.shuffle:
            order = torch.randperm(len(self.examples), generator=_generator(self.seed, epoch))
        for batch in range(start, len(self)):
            index = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield self.rows(index, epoch, batch)

    @abstractmethod
    def rows(self, index: Tensor, epoch: int, batch: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of these rows on the device, as this batch of this epoch has them."""


class Loader(Batches):
    """Batches of `images`, normalised with the mean and std of `data`'s training split.

    The augmentation of a batch depends only on (seed, epoch, batch index). It is drawn on the CPU, as the order is: a run
    resumed within an epoch sees bit-identical batches, and every device sees the same crops and flips. A transform of the
    user's own gets one image, uint8 [C, H, W], and returns such; it may draw from PyTorch's, Python's and NumPy's generators.
    Inputs are float32 [n, C, H, W] and labels int64 [n].
    """

    def __init__(
        self,
        images: Images,
        data: "Data",
        batch_size: int,
        *,
        device: str | torch.device = "cpu",
        augment: str = "none",
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        self._transform = find_transform(augment)
        super().__init__(images, batch_size, device=device, seed=seed, shuffle=shuffle)
        self.images, self.augment = images, augment
        # pixel / 255 standardised, as one product and one sum on the raw bytes
        mean, std = (
            torch.tensor(v, device=self.device).view(-1, 1, 1) for v in (data.mean, data.std)
        )
        self._scale, self._shift = 1 / (255 * std), -mean / std

    def rows(self, index: Tensor, epoch: int, batch: int) -> tuple[Tensor, Tensor]:
        pixels = self.images.images[index]
        if self._transform is not None:
            with random_numbers_of(_seed(self.seed, epoch, batch)):
                pixels = torch.stack([self._transformed(image) for image in pixels])
        pixels = pixels.to(self.device, non_blocking=True)
        if self._transform is None:
            pixels = self._augmented(pixels, _generator(self.seed, epoch, batch))
        inputs = pixels.float().mul_(self._scale).add_(self._shift)
        return inputs, self.images.labels[index].to(self.device, non_blocking=True)

    def _transformed(self, image: Tensor) -> Tensor:
        assert self._transform is not None
        made = self._transform(image)
        if not isinstance(made, Tensor) or (made.shape, made.dtype) != (image.shape, image.dtype):
            got = f"{made.dtype} {list(made.shape)}" if isinstance(made, Tensor) else type(made)
            raise ConfigError(
                f"the augmentation {self.augment!r} returned {got} for an image uint8 {list(image.shape)}: it must return the "
                "like, since all images of a batch have one size and are normalised after it"
            )
        return made

    def _augmented(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """uint8 [n, C, H, W] -> the same, cropped and flipped per image as `augment` says."""
        count, _, height, width = pixels.shape
        if "crop" in self.augment:
            # 4 pixels of black border at 32 x 32, in proportion elsewhere
            pad_y, pad_x = (max(1, round(side / 8)) for side in (height, width))
            down = torch.randint(2 * pad_y + 1, (count,), generator=generator).to(pixels.device)
            right = torch.randint(2 * pad_x + 1, (count,), generator=generator).to(pixels.device)
            windows = (
                F.pad(pixels, (pad_x, pad_x, pad_y, pad_y)).unfold(2, height, 1).unfold(3, width, 1)
            )
            pixels = windows[torch.arange(count, device=pixels.device), :, down, right]
        if "flip" in self.augment:
            mirrored = torch.rand(count, generator=generator).to(pixels.device) < 0.5
            pixels = torch.where(mirrored.view(-1, 1, 1, 1), pixels.flip(3), pixels)
        return pixels


def _generator(*key: int) -> torch.Generator:
    """A generator for (seed, epoch[, batch])."""
    return torch.Generator().manual_seed(_seed(*key))


def _seed(*key: int) -> int:
    """A seed for this key; neighbouring keys give unrelated streams."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
