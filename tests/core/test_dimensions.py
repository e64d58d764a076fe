"""What a dimension is comes from the layer that made the tensor, never from its size or from a layer beside it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import feedbackward as fb
from feedbackward.engine.target import Target


class Net(nn.Module):
    """Layers by name, and a function that calls them."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3))


MAP = torch.randn(5, 2, 8, 8, generator=torch.Generator().manual_seed(0))
SEQUENCE = torch.randn(5, 9, 4, generator=torch.Generator().manual_seed(0))

# the last site of each net, and how many of its dimensions are tokens: from the meaning of the net
NETS: dict[str, tuple[Net, Tensor, int]] = {
    "squeeze and excitation": (
        Net(
            lambda m, x: m.out((h := m.conv(x).relu()) * m.gate(pooled(h))[:, :, None, None]),
            conv=nn.Conv2d(2, 6, 3), gate=nn.Linear(6, 6), out=nn.Conv2d(6, 3, 1),
        ), MAP, 0,
    ),
    "embedding of time": (
        Net(
            lambda m, x: m.out((m.conv(x) + m.time(pooled(x)).unsqueeze(-1).unsqueeze(-1)).relu()),
            conv=nn.Conv2d(2, 6, 3), time=nn.Linear(2, 6), out=nn.Conv2d(6, 3, 1),
        ), MAP, 0,
    ),
    "features scaled by a style": (
        Net(
            lambda m, x: m.out(F.silu(m.conv(x)) * (1 + m.style(pooled(x))[..., None, None])),
            conv=nn.Conv2d(2, 6, 3), style=nn.Linear(2, 6), out=nn.Conv2d(6, 3, 1),
        ), MAP, 0,
    ),
    "layer norm over the map": (
        Net(
            lambda m, x: m.out(m.norm(m.conv(x)).relu()),
            conv=nn.Conv2d(2, 6, 3), norm=nn.LayerNorm([6, 6, 6]), out=nn.Conv2d(6, 3, 1),
        ), MAP, 0,
    ),
    "layer norm over the width": (
        Net(
            lambda m, x: m.out(m.norm(m.conv(x)).relu()),
            conv=nn.Conv2d(2, 6, 3), norm=nn.LayerNorm(6), out=nn.Conv2d(6, 3, 1),
        ), MAP, 0,
    ),
    "linear layers within a conv block": (
        Net(
            lambda m, x: m.out(
                (h := m.conv(x)) + m.wide(m.norm(h.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
            ),
            conv=nn.Conv2d(2, 6, 3), norm=nn.LayerNorm(6), wide=nn.Linear(6, 6),
            out=nn.Conv2d(6, 3, 1),
        ), MAP, 0,
    ),
    "a gate concatenated to a map": (
        Net(
            lambda m, x: m.out(
                torch.cat([m.conv(x), m.gate(pooled(x))[..., None, None].expand(-1, -1, 6, 6)], 1)
            ),
            conv=nn.Conv2d(2, 6, 3), gate=nn.Linear(2, 2), out=nn.Conv2d(8, 3, 1),
        ), MAP, 0,
    ),
    "patches of a convolution": (
        Net(
            lambda m, x: m.out(m.conv(x).flatten(2).transpose(1, 2).relu()).mean(1),
            conv=nn.Conv2d(2, 6, 4, 4), out=nn.Linear(6, 3),
        ), MAP, 1,
    ),
    "a convolution over tokens": (
        Net(
            lambda m, x: m.out(m.conv(m.into(x).relu().transpose(1, 2)).transpose(-1, -2).relu()),
            into=nn.Linear(4, 6), conv=nn.Conv1d(6, 6, 3, padding=1), out=nn.Linear(6, 3),
        ), SEQUENCE, 1,
    ),
    "batch norm over flat tokens": (
        Net(
            lambda m, x: m.out(m.norm(m.into(x).flatten(0, 1)).unflatten(0, x.shape[:2]).relu()),
            into=nn.Linear(4, 6), norm=nn.BatchNorm1d(6), out=nn.Linear(6, 3),
        ), SEQUENCE, 1,
    ),
    "a convolution beside the tokens": (
        Net(
            lambda m, x: m.out(
                m.into(x) * m.beside(x.transpose(1, 2)).mean(2).unsqueeze(1)
            ),
            into=nn.Linear(4, 6), beside=nn.Conv1d(4, 6, 3), out=nn.Linear(6, 3),
        ), SEQUENCE, 1,
    ),
    "channels pooled to a map, after a gate": (
        Net(
            lambda m, x: m.out(
                (h := m.conv(x) * m.gate(pooled(x))[..., None, None]).mean(1, True) + h.amax(1, True)
            ),
            conv=nn.Conv2d(2, 6, 3), gate=nn.Linear(2, 6), out=nn.Conv2d(1, 3, 1),
        ), MAP, 0,
    ),
    "weights of a convolution made by a style": (
        Net(
            lambda m, x: m.out(
                F.conv2d(
                    x.flatten(0, 1)[None], m.style(pooled(x)).view(-1, 1, 1, 1), groups=len(x) * 2
                ).unflatten(1, x.shape[:2])[0]
            ),
            style=nn.Linear(2, 2), out=nn.Conv2d(2, 3, 1),
        ), MAP, 0,
    ),
    "points turned by a matrix that is learned": (
        Net(
            lambda m, x: m.out(m.turn(x.mean(1)).view(-1, 4, 4).bmm(x.transpose(1, 2)).tanh()).mean(2),
            turn=nn.Linear(4, 16), out=nn.Conv1d(4, 3, 1),
        ), SEQUENCE, 0,
    ),
    "tokens mixed by a matrix that is learned": (
        Net(
            lambda m, x: m.out(m.mix(x.mean(2)).view(-1, 9, 9).bmm(x).tanh()).mean(1),
            mix=nn.Linear(9, 81), out=nn.Linear(4, 3),
        ), SEQUENCE, 1,
    ),
    "a convolution that no module applies, after a gate": (
        Net(
            lambda m, x: m.out(
                F.conv2d(x, m.weight.weight.view(6, 2, 1, 1)) * m.gate(pooled(x))[..., None, None]
            ).mean((2, 3)),
            weight=nn.Linear(2, 6, bias=False), gate=nn.Linear(2, 6), out=nn.Conv2d(6, 3, 1),
        ), MAP, 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_tokens_follow_the_producer(name: str) -> None:
    net, x, tokens = NETS[name]
    site = fb.attach(net, fb.DFA(), example=x).sites[-1]
    assert site.tokens == tokens, site


@pytest.mark.parametrize("swap", [(1, 2), (-1, -2)])
def test_logits_with_the_classes_before_the_steps_are_no_tokens(swap: tuple[int, int]) -> None:
    """As `cross_entropy` takes them: with as many steps as classes only the graph tells."""
    into, out = nn.Linear(4, 6), nn.Linear(6, 9)
    net = Net(lambda m, x: m.out(m.into(x).relu()).transpose(*swap), into=into, out=out)
    assert fb.attach(net, fb.DFA(), example=SEQUENCE).source.tokens == 0


@pytest.mark.parametrize(
    "sizes", [(5, 3, 7), (5, 7, 7), (7, 3, 7), (5, 5, 7), (7, 7, 7), (2, 2, 2)]
)
def test_targets_of_tokens_of_any_size(sizes: tuple[int, int, int]) -> None:
    n, steps, classes = sizes
    y = torch.randint(classes, (n, steps), generator=torch.Generator().manual_seed(1))
    tokens, maps = torch.zeros(n, steps, classes), torch.zeros(n, classes, steps)
    assert torch.equal(Target(y).one_hot(tokens, 1), F.one_hot(y, classes).float())
    assert torch.equal(Target(y).one_hot(maps, 0), F.one_hot(y, classes).float().movedim(-1, 1))


@pytest.mark.parametrize("sizes", [(5, 3, 4, 6), (5, 3, 3, 3), (3, 3, 3, 3), (3, 3, 4, 3)])
def test_targets_of_maps_of_any_size(sizes: tuple[int, int, int, int]) -> None:
    n, classes, height, width = sizes
    y = torch.randint(classes, (n, height, width), generator=torch.Generator().manual_seed(1))
    expected = F.one_hot(y, classes).float().movedim(-1, 1)
    assert torch.equal(Target(y).one_hot(torch.zeros(sizes), 0), expected)


@pytest.mark.parametrize("steps", [3, 5, 7])
@pytest.mark.parametrize("batch", [5, 7])
def test_drtp_on_tokens_equals_drtp_on_flat_rows(batch: int, steps: int) -> None:
    def grads(flat: bool) -> list[Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 7))
        x, y = torch.randn(batch, steps, 4).double(), torch.randint(7, (batch, steps))
        if flat:
            x, y = x.flatten(0, 1), y.flatten()
        learner = fb.attach(net.double(), fb.DRTP(), example=x)
        learner.target(y)
        F.cross_entropy(learner(x).flatten(0, -2), y.flatten()).backward()
        return [p.grad for p in net.parameters() if p.grad is not None]

    for found, expected in zip(grads(False), grads(True), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
