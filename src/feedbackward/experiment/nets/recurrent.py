"""Recurrent networks that predict the next token."""

from collections.abc import Callable

from torch import Tensor, nn


class Recurrent(nn.Module):
    """Embedding, recurrent layers and a linear head: int64 [N, T] -> scores [N, T, vocabulary].

    Each layer is a module of its own, whose output sequence is a site. `kind`: nn.RNN, nn.GRU or nn.LSTM. Weights start as
    PyTorch has them; `norm` changes nothing.
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
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(classes, width)
        self.layers = nn.ModuleList(kind(width, width, batch_first=True) for _ in range(depth))
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        for layer in self.layers:
            h, _ = layer(h)
        return self.head(self.drop(h))
