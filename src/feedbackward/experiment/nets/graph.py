"""Graph networks that classify nodes, of torch_geometric's convolutions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from feedbackward.errors import ConfigError


def gcn(inputs: int, outputs: int, last: bool) -> nn.Module:
    """Kipf & Welling 2017."""
    return _layers().GCNConv(inputs, outputs)


def gat(inputs: int, outputs: int, last: bool, heads: int = 8) -> nn.Module:
    """Velickovic et al. 2018: heads that divide the outputs, but for one head in the last layer."""
    heads = 1 if last else heads
    return _layers().GATConv(inputs, outputs // heads, heads=heads)


def sage(inputs: int, outputs: int, last: bool) -> nn.Module:
    """Hamilton et al. 2017, with the mean of the neighbours."""
    return _layers().SAGEConv(inputs, outputs)


def gin(inputs: int, outputs: int, last: bool) -> nn.Module:
    """Xu et al. 2019: two linear layers on the sum of the neighbours."""
    inside = nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU(), nn.Linear(outputs, outputs))
    return _layers().GINConv(inside)


class GraphLayer(nn.Module):
    """A convolution, an activation and dropout."""

    def __init__(self, conv: nn.Module, act: nn.Module, dropout: float) -> None:
        super().__init__()
        self.conv, self.act, self.drop = conv, act, nn.Dropout(dropout)

    def forward(self, h: Tensor, edges: Tensor) -> Tensor:
        return self.drop(self.act(self.conv(h, edges)))


class GraphNet(nn.Module):
    """Features [N, F] of all nodes and edges [2, E] -> scores [N, classes].

    `depth` convolutions, the last of which gives the scores. A layer's output, after dropout, is a site. There is no dropout
    of the features, which would cost more than the rest of a pass. Weights start as torch_geometric has them; `norm` changes
    nothing. `conv(inputs, outputs, last)` makes a convolution.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        classes: int,
        norm: bool = True,
        *,
        conv: Callable[[int, int, bool], nn.Module],
        width: int,
        depth: int = 2,
        act: type[nn.Module] = nn.ReLU,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        widths = [in_shape[0], *[width] * (depth - 1)]
        self.layers = nn.ModuleList(
            GraphLayer(conv(n, width, False), act(), dropout) for n in widths[:-1]
        )
        self.head = conv(widths[-1], classes, True)

    def forward(self, features: Tensor, edges: Tensor) -> Tensor:
        h = features
        for layer in self.layers:
            h = layer(h, edges)
        return self.head(h, edges)


def sites(depth: int) -> tuple[str, ...]:
    """The outputs of all layers but the last."""
    return tuple(f"layers.{i}" for i in range(depth - 1))


@functools.cache
def _layers() -> Any:
    try:
        import torch_geometric.nn as layers
    except ImportError as error:
        raise ConfigError(
            f"graph nets need torch_geometric, which cannot be imported ({error}): pip install 'feedbackward[graphs]'"
        ) from error
    return layers
