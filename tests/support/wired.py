"""Models wired by a function: for one-off shapes of a forward pass."""

from __future__ import annotations

import torch
from torch import nn


class Net(nn.Module):
    """A model made of named modules and a function that wires them."""

    def __init__(self, wiring, **modules: nn.Module) -> None:
        super().__init__()
        self.wiring = wiring
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *args, **kwargs):
        return self.wiring(self, *args, **kwargs)


def two_layers(wiring, **more: nn.Module) -> Net:
    return Net(wiring, a=nn.Linear(6, 8), b=nn.Linear(8, 8), out=nn.Linear(8, 3), **more)


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
