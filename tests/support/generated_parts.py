"""The parts that random models are made of: a block that goes through its steps, and parts that do things of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Goes through its steps: each is an operation, the name of a part, and the numbers of the earlier results it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[str, str, tuple[int, ...]]] = []

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Any:
        results = [x, extra]
        for operation, name, taken in self.steps:
            given = [results[i] for i in taken]
            part = getattr(self, name) if name else None
            results.append(OPERATIONS[operation](part, *given))
        return results[-1]


class Residual(Block):
    """Adds its input."""

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        return x + super().forward(x)


class Shift(nn.Module):
    """Subtracts a mean that it keeps in a buffer."""

    def __init__(self, axis: int, width: int) -> None:
        super().__init__()
        self.axis, self.passes = axis, 0
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        axes = [i for i in range(x.dim()) if i != self.axis % x.dim()]
        shape = [1] * x.dim()
        shape[self.axis] = -1
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * x.detach().mean(axes))
            self.passes += 1
        return x - self.mean.view(shape)


class Scale(nn.Module):
    """A parameter per feature."""

    def __init__(self, axis: int, width: int) -> None:
        super().__init__()
        self.shape = [width] if axis == -1 else [width, 1, 1]
        self.scale = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.view(self.shape)


class Own(nn.Module):
    """A product with a weight of its own, in no Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(width, width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix)


class Masked(nn.Linear):
    """A Linear whose activity is its second argument."""

    def forward(self, mask: Tensor, x: Tensor) -> Tensor:
        return super().forward(x) * mask


class Attention(nn.Module):
    """One head, by Linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.q(x) @ self.k(x).transpose(1, 2) / x.shape[-1] ** 0.5).softmax(-1)
        return self.out(weights @ self.v(x))


class Excite(nn.Module):
    """Squeeze and excitation: a gate per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc(x.mean((2, 3))))[:, :, None, None]


class Halves(nn.Module):
    """Returns two tensors."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.fc(x).chunk(2, -1)
        return torch.tanh(a), torch.sigmoid(b)


OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda m, x: m(x),
    "keyword": lambda m, x: m(input=x),
    "mask first": lambda m, x: m(torch.full_like(x[..., :1], 0.5), x),
    "mask by keyword": lambda m, x: m(x=x, mask=torch.full_like(x[..., :1], 0.5)),
    "attend": lambda m, x: m(x, x, x, need_weights=False)[0],
    "recur": lambda m, x: m(x)[0],
    "halves": lambda m, x: torch.mul(*m(x)),
    "twice": lambda m, x: m(torch.tanh(m(x))),
    "no gradient": lambda m, x: _without_gradient(m, x),
    "over tokens": lambda m, x: m(x.transpose(1, 2)).transpose(1, 2),
    "unbiased": lambda m, x: F.linear(x, m.weight),
    "relu": lambda m, x: F.relu(x),
    "tanh": lambda m, x: torch.tanh(x),
    "gelu": lambda m, x: F.gelu(x),
    "half": lambda m, x: x * 0.5,
    "drop": lambda m, x: F.dropout(x, 0.2),
    "clone": lambda m, x: x.clone(),
    "detach": lambda m, x: x.detach(),
    "add": lambda m, a, b: a + b,
    "gate": lambda m, a, b: a * torch.sigmoid(b),
    "join": lambda m, a, b: torch.cat([a, b], 1 if a.dim() == 4 else -1),
    "times extra": lambda m, x, extra: x * extra.view(-1, *[1] * (x.dim() - 1)),
    "flip": lambda m, x: x.flip(0),
    "flip and back": lambda m, x: torch.tanh(x.flip(0)).flip(0),
    "turn and back": lambda m, x: torch.tanh(x.transpose(0, 1)).transpose(0, 1),
    "sort": lambda m, x: x[x.flatten(1).sum(1).argsort()],
    "reverse tokens": lambda m, x: x.flip(1),
    "pool": lambda m, x: F.avg_pool2d(x, 2),
    "max pool": lambda m, x: F.max_pool2d(x, 2),
    "to vector": lambda m, x: x.flatten(1),
    "mean": lambda m, x: x.mean((2, 3) if x.dim() == 4 else 1),
    "first token": lambda m, x: x[:, 0],
    "to tokens": lambda m, x: x.flatten(2).transpose(1, 2),
    "log softmax": lambda m, x: x.log_softmax(-1),
    "tuple": lambda m, x: (x, x.detach().mean()),
    "dict": lambda m, x: {"scale": x.detach().mean(), "logits": x},
    "both": lambda m, x, hidden: {"hidden": hidden, "logits": x},
}


def _without_gradient(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return module(x)
