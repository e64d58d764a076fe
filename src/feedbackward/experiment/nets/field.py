"""A network that knows a picture: the colour of a place."""

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn

from feedbackward.experiment.nets.blocks import linear_block


class Fourier(nn.Module):
    r"""Places `[N, d]` -> :math:`[\sin 2 \pi x F, \cos 2 \pi x F]`, with `F` fixed and normal (Tancik et al. 2020).

    scale: the standard deviation of `F`: how fine the details are that can be told apart.
    """

    def __init__(self, inputs: int, frequencies: int, scale: float) -> None:
        super().__init__()
        self.frequencies: Tensor
        self.register_buffer("frequencies", scale * torch.randn(inputs, frequencies))

    def forward(self, x: Tensor) -> Tensor:
        angle = 2 * math.pi * x @ self.frequencies
        return torch.cat([angle.sin(), angle.cos()], -1)


class Field(nn.Sequential):
    """Fourier features, hidden linear layers with ReLU, a linear output: [N, d] -> [N, channels]."""

    def __init__(
        self,
        in_shape: tuple[int, ...],
        classes: int,
        norm: bool = True,
        *,
        frequencies: int = 64,
        scale: float = 2.0,
        width: int = 128,
        depth: int = 4,
    ) -> None:
        super().__init__()
        features = Fourier(in_shape[0], frequencies, scale)
        last = 2 * frequencies
        for position in range(1, depth):
            block = linear_block((last, width))
            if position == 1:  # inside the first block, so that no block lacks parameters
                block = nn.Sequential(OrderedDict(fourier=features, **dict(block.named_children())))
            self.add_module(f"block{position}", block)
            last = width
        self.head = nn.Linear(last, classes)
