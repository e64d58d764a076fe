"""CwComp's losses against loops over channels, and their gradients against central differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pairs import CONV, MLP, Pair, loss_fn, signals
from torch import nn

import feedbackward as fb
from feedbackward.rules import CwComp

EPS, TAU = 1e-6, 0.5


def token_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 9), nn.Tanh(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 4))


WIDE = Pair("wide-tokens", token_net, (5, 3), (5,), 4, ("1", "3"))


def written(h: np.ndarray, y: np.ndarray, classes: int, channels: int) -> float:
    """The mean over labels of CE(G / tau, y), channel by channel. `h: [labels, channels, positions]`."""
    total = 0.0
    for m in range(len(h)):
        squares: list[list[float]] = [[] for _ in range(classes)]
        for k in range(channels):
            squares[k * classes // channels] += [float(v) ** 2 for v in h[m, k]]
        scores = np.array([sum(group) / len(group) for group in squares]) / TAU
        total += math.log(np.exp(scores).sum()) - scores[y[m]]
    return total / len(h)


# the channels of each site: of the flattened one those of the map before
CHANNELS = {"pool1": 4, "flat": 6, "act3": 5}


@pytest.mark.parametrize("pair", [MLP, CONV, WIDE], ids=str)
def test_signals_are_the_slopes_of_the_written_loss(pair: Pair) -> None:
    """Along a random direction at every site, so that one central difference checks all entries."""
    learner = pair.attach(CwComp(temperature=TAU))
    x, y = pair.batch()
    hs: dict[str, torch.Tensor] = {}
    for site in learner.sites:
        learner.model.get_submodule(site.name).register_forward_hook(
            lambda m, a, out, name=site.name: hs.__setitem__(name, out.detach().clone())
        )
    learner.target(y)
    found = signals(learner, x, y)
    for site in learner.sites:
        h = hs[site.name]
        u = torch.randn(h.shape, dtype=h.dtype, generator=torch.Generator().manual_seed(7))
        channels = CHANNELS[site.name] if pair is CONV else h.shape[-1]

        def loss(h: torch.Tensor, channels: int = channels) -> float:
            rows = h.reshape(y.numel(), channels, -1).numpy()
            return written(rows, y.flatten().numpy(), pair.classes, channels)

        slope = (loss(h + EPS * u) - loss(h - EPS * u)) / (2 * EPS)
        got = float((found[site.name] * u).sum())  # type: ignore[operator]
        assert math.isclose(got, slope, rel_tol=1e-6, abs_tol=1e-9)


def test_descent_makes_the_right_group_the_most_active() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    x, y = torch.randn(30, 6), torch.arange(30) % 3
    learner = fb.attach(model, CwComp(), example=x)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(200):
        optimizer.zero_grad()
        learner.target(y)
        loss_fn(y)(learner(x)).backward()
        optimizer.step()
    goodness = model[:2](x).square().reshape(30, 3, 4).mean(2)
    assert (goodness.argmax(1) == y).float().mean() > 0.9


def test_sites_with_too_few_channels_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 10))
    with pytest.raises(fb.AttachError, match=r"site '1' has 6 for 10 classes"):
        fb.attach(model, CwComp(), example=torch.randn(3, 4))
    with pytest.raises(fb.AttachError, match=r"temperature above 0"):
        CwComp(temperature=0)
    assert not list(MLP.attach(CwComp()).feedback.parameters())
