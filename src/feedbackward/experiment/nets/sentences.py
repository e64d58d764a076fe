"""Networks that read a sentence: recurrent layers or blocks of attention, and the mean over its words."""

from torch import Tensor, nn

from feedbackward.experiment.nets.transformer import Block, Embedding


class MaskedGRU(nn.Module):
    """A GRU layer whose outputs are zero where there is no word: [N, T, d] and bool [N, T] -> [N, T, d]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rnn = nn.GRU(width, width, batch_first=True)

    def forward(self, h: Tensor, there: Tensor) -> Tensor:
        return self.rnn(h)[0] * there.unsqueeze(-1)


class Sentences(nn.Module):
    """Numbers of words int64 [N, T], 0 where there is none -> scores [N, classes].

    `in_shape` is (T, words). The outputs of each layer are zero at padding, so a signal there trains nothing.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        classes: int,
        norm: bool = True,
        *,
        attention: bool = False,
        width: int = 64,
        depth: int = 2,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        length, words = in_shape
        self.embed = Embedding(length, words, width) if attention else nn.Embedding(words, width)
        self.layers = nn.ModuleList(
            Block(width, 4, dropout) if attention else MaskedGRU(width) for _ in range(depth)
        )
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(width, classes)

    def forward(self, words: Tensor) -> Tensor:
        there = words > 0
        h = self.embed(words)
        for layer in self.layers:
            h = layer(h, there)
        return self.head(self.drop(h.sum(1) / there.sum(1, keepdim=True)))
