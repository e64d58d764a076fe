"""DeepFM: a factorisation machine and a multi-layer perceptron over the same embeddings (Guo et al. 2017)."""

import torch.nn.functional as F
from torch import Tensor, nn

from feedbackward.experiment.nets.blocks import linear_block


class DeepFM(nn.Module):
    r"""Numbers of values int64 [N, fields] -> scores [N, 2] of no click and of a click.

    With the embeddings :math:`v_f` of a row's values, the log-odds are :math:`\sum_f w_f + \sum_{f<g} v_f \cdot v_g` plus what
    the perceptron makes of all :math:`v_f`. `in_shape` is (fields, values of all fields).
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        classes: int,
        norm: bool = True,
        *,
        width: int = 16,
        hidden: tuple[int, ...] = (128, 128),
    ) -> None:
        super().__init__()
        fields, values = in_shape
        self.embed, self.bias = nn.Embedding(values, width), nn.Embedding(values, 1)
        nn.init.normal_(self.embed.weight, std=0.1)
        nn.init.zeros_(self.bias.weight)
        self.flatten = nn.Flatten()
        last = fields * width
        for position, out in enumerate(hidden, start=1):
            self.add_module(f"block{position}", linear_block((last, out)))
            last = out
        self.depth = len(hidden)
        self.head = nn.Linear(last, classes)
        # the sum of both parts, a module so that its error can be sent
        self.sum = nn.Identity()

    def forward(self, values: Tensor) -> Tensor:
        v = self.embed(values)
        pairs = (v.sum(1).square() - v.square().sum(1)).sum(1, keepdim=True) / 2
        odds = pairs + self.bias(values).sum(1)
        h = self.flatten(v)
        for position in range(1, self.depth + 1):
            h = self.get_submodule(f"block{position}")(h)
        return self.sum(self.head(h) + F.pad(odds, (1, 0)))
