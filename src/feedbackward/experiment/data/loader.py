"""Batches on the training device: shuffled, augmented and normalised, the same after a resume."""

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from feedbackward.errors import ConfigError
from feedbackward.experiment.data.decode import Images

if TYPE_CHECKING:
    from feedbackward.experiment.data.dataset import Data

AUGMENTATIONS = ("none", "flip", "crop", "crop-flip")


def check_augment(augment: str) -> None:
    """Raise ConfigError unless `augment` is one of AUGMENTATIONS."""
    if augment not in AUGMENTATIONS:
        raise ConfigError(f"Unknown augment '{augment}': choose one of {', '.join(AUGMENTATIONS)}.")


class Loader:
    """Batches of `images`, normalised with the mean and std of `data`'s training split.

    The order depends only on (seed, epoch), the augmentation of a batch only on (seed, epoch, batch index).
    Both are drawn on the CPU: a run resumed within an epoch sees bit-identical batches, and every device sees
    the same crops and flips.

    While shuffling (training), a last batch of a single image is dropped, because batch norm has no variance
    to compute from it; without shuffling (evaluation) every image is kept.
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
        check_augment(augment)
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}: it must be at least 1.")
        self.images, self.batch_size, self.device = images, batch_size, torch.device(device)
        self.augment, self.seed, self.shuffle = augment, seed, shuffle
        # pixel / 255 standardised, as one product and one sum on the raw bytes
        mean, std = (
            torch.tensor(v, device=self.device).view(-1, 1, 1) for v in (data.mean, data.std)
        )
        self._scale, self._shift = 1 / (255 * std), -mean / std

    def __len__(self) -> int:
        """Batches per epoch."""
        whole, rest = divmod(len(self.images), self.batch_size)
        return whole + (rest > 1 or (rest == 1 and not self.shuffle))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches `start`, `start` + 1, ... of an epoch: inputs float32 [n, C, H, W] and labels int64 [n]."""
        order = torch.arange(len(self.images))
        if self.shuffle:
            order = torch.randperm(len(self.images), generator=_generator(self.seed, epoch))
        for batch in range(start, len(self)):
            index = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            pixels = self.images.images[index].to(self.device, non_blocking=True)
            pixels = self._augmented(pixels, _generator(self.seed, epoch, batch))
            inputs = pixels.float().mul_(self._scale).add_(self._shift)
            yield inputs, self.images.labels[index].to(self.device, non_blocking=True)

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
    """A generator for (seed, epoch[, batch]); neighbouring keys give unrelated streams."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
