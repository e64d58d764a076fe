"""Recurrent networks that predict what comes next, a token or a frame of keys, and one that reads images by rows."""

import itertools
from collections.abc import Callable

from torch import Tensor, nn

from feedbackward.unrolled import unroll


class Recurrent(nn.Module):
    """An embedding, recurrent layers and a linear head.

    int64 [N, T] -> scores [N, T, vocabulary], or where `frames`: [N, T, keys] -> logits [N, T, keys].

    Each layer is a module of its own, whose output sequence is a site. `kind`: nn.RNN, nn.GRU or nn.LSTM. Where `steps`,
    a layer runs step by step, and its module `steps.0` is a site of every step. Weights start as PyTorch has them; `norm`
    changes nothing.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        classes: int,
        norm: bool = True,
        *,
        kind: Callable[..., nn.RNNBase] = nn.GRU,
        width: int = 128,
        depth: int = 2,
        dropout: float = 0.0,
        frames: bool = False,
        steps: bool = False,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(in_shape[-1], width) if frames else nn.Embedding(classes, width)
        layers = [kind(width, width, batch_first=True) for _ in range(depth)]
        self.layers = nn.ModuleList(unroll(layer) if steps else layer for layer in layers)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(width, classes)

    def forward(self, sequences: Tensor) -> Tensor:
        h = self.embed(sequences)
        for layer in self.layers:
            h, _ = layer(h)
        return self.head(self.drop(h))


class Rows(nn.Module):
    """Images [N, C, H, W] as sequences of H rows, recurrent layers, and a linear head on the last step: [N, classes].

    `kind`, `steps` and `norm`: as in :class:`Recurrent`.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        classes: int,
        norm: bool = True,
        *,
        kind: Callable[..., nn.RNNBase] = nn.GRU,
        width: int = 128,
        depth: int = 2,
        steps: bool = False,
    ) -> None:
        super().__init__()
        channels, _, columns = in_shape
        widths = [channels * columns] + [width] * depth
        layers = [kind(a, b, batch_first=True) for a, b in itertools.pairwise(widths)]
        self.layers = nn.ModuleList(unroll(layer) if steps else layer for layer in layers)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        h = images.transpose(1, 2).flatten(2)
        for layer in self.layers:
            h, _ = layer(h)
        return self.head(h[:, -1])
