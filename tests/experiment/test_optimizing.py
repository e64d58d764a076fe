"""Optimizers of a run: rates over the epochs, clipping, and norms that are kept."""

import math

import pytest
import torch
from torch import nn

from feedbackward.errors import ConfigError
from feedbackward.experiment.config.recipes import Optimizer, check
from feedbackward.experiment.training.optimizing import Weights


def test_schedules_reach_their_ends():
    def rates(**settings):
        weights = Weights(
            [nn.Parameter(torch.ones(1))],
            Optimizer(lr=1.0, **settings),
            epochs=4,
            steps_per_epoch=10,
        )
        weights.parameters[0].grad = torch.ones(1)
        found = []
        for _ in range(40):
            found.append(weights.lr)
            weights.step(torch.amp.GradScaler("cpu", enabled=False))
        return found

    assert rates(schedule="constant") == [1.0] * 40
    cosine = rates(schedule="cosine")
    assert cosine == pytest.approx([(1 + math.cos(math.pi * t / 40)) / 2 for t in range(40)])
    assert rates(schedule="step", gamma=0.5) == pytest.approx([0.5 ** (t // 10) for t in range(40)])
    cycle = rates(schedule="one-cycle")
    assert (max(cycle), cycle.index(max(cycle))) == (pytest.approx(1.0), 11)
    assert cycle[-1] < 1e-4 < cycle[0] == pytest.approx(1 / 25)


def test_clipping_bounds_the_step():
    weights = Weights([nn.Parameter(torch.zeros(4))], Optimizer(
        lr=1.0, momentum=0.0, nesterov=False, weight_decay=0.0, schedule="constant", clip=0.5), 1, 1)  # fmt: skip
    weights.parameters[0].grad = torch.full((4,), 10.0)
    weights.step(torch.amp.GradScaler("cpu", enabled=False))
    assert weights.parameters[0].norm().item() == pytest.approx(0.5, rel=1e-4)


def test_norms_are_kept_where_the_recipe_says_so():
    W = nn.Parameter(torch.arange(6.0).view(2, 3))
    weights = Weights(
        [W], Optimizer(lr=0.1, renormalize_weights=True), epochs=1, steps_per_epoch=10
    )
    for _ in range(3):
        W.grad = torch.ones_like(W)
        weights.step(torch.amp.GradScaler("cpu", enabled=False))
    assert W.detach().norm().item() == pytest.approx(55**0.5)
    assert W[0, 0].item() < -1e-3


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("torch.optim:RMSprop", {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}),
        ("torch.optim:Adamax", {"lr": 0.1, "weight_decay": 5e-4}),
    ],
)
def test_an_optimizer_by_its_name_is_given_what_it_takes(name, given):
    settings = Optimizer(name=name, lr=0.1, schedule="constant")
    check(settings, "forward")
    ours, theirs = (nn.Parameter(torch.arange(6.0).view(2, 3)) for _ in range(2))
    weights = Weights([ours], settings, epochs=1, steps_per_epoch=10)
    optimizer = getattr(torch.optim, name.partition(":")[2])([theirs], **given)
    for _ in range(3):
        ours.grad, theirs.grad = torch.ones(2, 3), torch.ones(2, 3)
        weights.step(torch.amp.GradScaler("cpu", enabled=False))
        optimizer.step()
    assert torch.equal(ours, theirs)


def test_optimizers_refused():
    with pytest.raises(ConfigError, match=r"forward\.name is 'adamm': did you mean 'adam'"):
        check(Optimizer(name="adamm"), "forward")
    for name, message in [
        ("torch.nn:Linear", "no.* subclass"),
        ("torch.optim:Absent", "could not be imported"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Weights([nn.Parameter(torch.ones(1))], Optimizer(name=name), 1, 10)
    # its matrices alone
    with pytest.raises(ConfigError, match=r"'torch\.optim:Muon' cannot be made with"):
        Weights([nn.Parameter(torch.ones(1))], Optimizer(name="torch.optim:Muon"), 1, 10)
