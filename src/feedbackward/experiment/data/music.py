"""Polyphonic music: which of 88 keys sound in each frame, and which in the next."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from feedbackward.errors import ConfigError, DataError
from feedbackward.experiment.config.data import DataConfig
from feedbackward.experiment.data.digest import digest_of
from feedbackward.experiment.data.loader import Batches
from feedbackward.experiment.data.named import (
    file_digest,
    find_file,
    read_arrays,
    refuse_options,
)
from feedbackward.experiment.data.splits import SplitData

# sets known by name, and where they lie below the data root
MUSIC = {
    name: f"small/music-{name.replace('-', '_')}.npz"
    for name in ("jsb-chorales", "nottingham", "musedata", "piano-midi")
}
KEYS, LOWEST = 88, 21  # the lowest key's MIDI number
# what a target holds where there is no frame
PADDING = -1.0
_SPLITS = {"train": "train", "validation": "valid", "test": "test"}


@dataclass(frozen=True)
class Pieces:
    """Pieces of music one after the other: uint8 [frames, 88], and of each piece its first frame and how many it has, [n]."""

    frames: Tensor
    first: Tensor
    lengths: Tensor

    def __len__(self) -> int:
        return len(self.first)

    def take(self, index: Tensor) -> Pieces:
        """The pieces at `index` (int64 [k])."""
        return Pieces(self.frames, self.first[index], self.lengths[index])

    def piece(self, i: int) -> Tensor:
        """One piece, [frames, 88]."""
        return self.frames[self.first[i] : self.first[i] + self.lengths[i]]

    def digest(self) -> str:
        """SHA-256 over the pieces, in order."""
        pieces = [self.piece(i) for i in range(len(self))]
        return digest_of(self.lengths, *pieces)


class PieceLoader(Batches):
    """Batches of pieces: frames float32 [n, T, 88], and the frame that follows each, [n, T, 88].

    T is the longest piece's number of frames less one. Shorter pieces end in frames of zeros, whose targets are `PADDING`.
    """

    examples: Pieces

    def rows(self, index: Tensor, epoch: int, batch: int) -> tuple[Tensor, Tensor]:
        pieces = [self.examples.piece(int(i)).float() for i in index]
        longest = max(len(piece) for piece in pieces) - 1
        inputs = torch.zeros(len(pieces), longest, KEYS)
        targets = torch.full_like(inputs, PADDING)
        for row, piece in enumerate(pieces):
            inputs[row, : len(piece) - 1] = piece[:-1]
            targets[row, : len(piece) - 1] = piece[1:]
        return inputs.to(self.device), targets.to(self.device)


def load_music(config: DataConfig) -> SplitData:
    """Read a set of pieces from an .npz file, with the split that it has.

    Its arrays: for each of `train`, `valid` and `test` the frames of all pieces [frames, 11], a bit for each of 88 keys, and
    `train_len` ... [n], the frames of each piece. `config.context` divides pieces into parts of at most so many frames to be
    predicted. A piece's first frame is not predicted, and pieces of one frame are left out.

    Raises DataError for a file that is missing or does not fit, and ConfigError for an option that is not of music.
    """
    refuse_options(config, "music", "classes", "size", "augment", "tokens")
    if config.context is not None and config.context < 1:
        raise ConfigError(f"data.context is {config.context}: it must be at least 1")
    path = find_file(config, MUSIC, "music")
    names = [name for split in _SPLITS.values() for name in (split, f"{split}_len")]
    arrays = read_arrays(path, tuple(names))
    limits = {
        "train": config.train_limit,
        "validation": config.validation,
        "test": config.test_limit,
    }
    splits = {}
    for ours, theirs in _SPLITS.items():
        frames, lengths = arrays[theirs], arrays[f"{theirs}_len"]
        if frames.ndim != 2 or frames.shape[1] != KEYS // 8 or lengths.sum() != len(frames):
            raise DataError(
                f"'{theirs}' of {path} has shape {frames.shape} and pieces of {lengths.sum()} frames: expected [frames, 11]"
            )
        found = _pieces(frames, lengths, config.context)
        splits[ours] = found.take(torch.arange(len(found))[: limits[ours]])
        if not len(splits[ours]):
            raise DataError(f"'{theirs}' of {path} has no piece of at least two frames")
    keys = [str(LOWEST + key) for key in range(KEYS)]
    form = {"keys": KEYS, "input": "1 for each key of classes that sounds in a frame, else 0"}
    name = path.stem.removeprefix("music-")
    train, validation, test = splits.values()
    return SplitData(name, train, validation, test, keys, (KEYS,), form)


def fingerprint_music(config: DataConfig) -> str:
    """A digest that is another as soon as the file has changed. Raises as `load_music` does."""
    return file_digest(find_file(config, MUSIC, "music"))


def _pieces(frames: np.ndarray, lengths: np.ndarray, context: int | None) -> Pieces:
    """The pieces, in parts: the last frame of one part is the first one of the next, so that each is predicted once."""
    starts, counts = [], []
    begin = 0
    for length in lengths.tolist():
        part = context or max(1, length - 1)
        for start in range(0, length - 1, part):
            starts.append(begin + start)
            counts.append(min(part, length - 1 - start) + 1)
        begin += length
    bits = torch.from_numpy(np.unpackbits(frames, axis=1))
    first, count = (torch.tensor(values, dtype=torch.int64) for values in (starts, counts))
    return Pieces(bits, first, count)
