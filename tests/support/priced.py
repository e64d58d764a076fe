"""Small models whose costs are known, and counts of real steps by torch's own counter."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import zoo
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import feedbackward as fb

N = 4


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for low, high in itertools.pairwise(sizes):
        layers += [nn.Linear(low, high), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def counted(rule: fb.Rule, model: nn.Module, x: Any, **options: Any) -> fb.Cost:
    learner = fb.attach(model, rule, example=x, **options)
    try:
        return fb.count_cost(learner, x)
    finally:
        learner.detach()


class TokenNet(nn.Module):
    """An attention block that multiplies its activities with each other, over tokens; its outputs are tokens too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(5, 8), nn.Linear(8, 3)
        self.norm, self.qkv, self.mix = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        q, k, v = self.qkv(self.norm(h)).chunk(3, -1)
        h = h + self.mix((q @ k.transpose(1, 2)).softmax(-1) @ v)
        return self.out(torch.relu(h))


@contextmanager
def single_products() -> Iterator[None]:
    """Kernels that run several products in one are not seen by a flop counter."""
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        yield


def macs_of_a_step(learner: fb.Learner, x: Any, loss_fn: Any, y: Tensor | None = None) -> float:
    """Of a real step; the counter gives two flops for a multiply-add."""
    if learner.attached.needs_target:
        assert y is not None
        learner.target(y)
    with FlopCounterMode(display=False) as flops, single_products():
        loss_fn(zoo.run(learner, x)).backward()
    return flops.get_total_flops() / 2
