"""A multi-layer perceptron."""

import math
from collections import OrderedDict

from torch import nn

from feedbackward.experiment.nets.blocks import Shape, linear_block


class MLP(nn.Sequential):
    """Flattened pixels, hidden linear layers, a linear output: [N, *in_shape] -> [N, classes].

    `hidden` are the hidden widths, each with the `activation`; three of 1000 units as Nøkland 2016 used on CIFAR-10 (with
    tanh there).
    There is no batch norm, whatever `norm` says. PyTorch's default initialisation.
    """

    def __init__(
        self,
        in_shape: Shape,
        classes: int,
        norm: bool = True,
        *,
        hidden: tuple[int, ...] = (1000, 1000, 1000),
        activation: type[nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        width = math.prod(in_shape)
        for position, out in enumerate(hidden, start=1):
            block = linear_block((width, out), activation=activation)
            if position == 1:  # inside the first block, so that no block lacks parameters
                block = nn.Sequential(
                    OrderedDict(flatten=nn.Flatten(), **dict(block.named_children()))
                )
            self.add_module(f"block{position}", block)
            width = out
        self.head = nn.Linear(width, classes)
