"""A recurrent language model whose projections of inputs are layers, so that a chain of feedback can go from layer to layer."""

import torch
from torch import Tensor, nn

WIDTH = 128


class ProjectedGRU(nn.Module):
    """`nn.GRU` in two parts: the product with the inputs, a Linear over the whole sequence, and the steps. [N, T, d] -> [N, T, d]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        whole = nn.GRU(width, width)
        self.project = nn.Linear(width, 3 * width)
        self.recur = nn.Linear(width, 3 * width)
        # nn.GRU's own initial law
        self.project.load_state_dict({"weight": whole.weight_ih_l0, "bias": whole.bias_ih_l0})
        self.recur.load_state_dict({"weight": whole.weight_hh_l0, "bias": whole.bias_hh_l0})

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), self.recur.in_features)
        states = []
        for given in self.project(x).unbind(1):
            kept = self.recur(h).chunk(3, -1)
            reset, update, new = given.chunk(3, -1)
            gate = torch.sigmoid(update + kept[1])
            proposed = torch.tanh(new + torch.sigmoid(reset + kept[0]) * kept[2])
            h = proposed + gate * (h - proposed)
            states.append(h)
        return torch.stack(states, 1)


def projected_gru(in_shape: tuple[int, ...], classes: int, norm: bool = True) -> nn.Module:
    """The network `gru` of the package, whose upper layer is a :class:`ProjectedGRU`. int64 [N, T] -> scores [N, T, classes]."""
    return _Stack(classes)


class _Stack(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(classes, WIDTH)
        self.lower = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.upper = ProjectedGRU(WIDTH)
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.upper(self.lower(self.embed(tokens))[0]))
