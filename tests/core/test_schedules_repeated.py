"""Forward passes that cannot be repeated are refused, and changes between two passes are noticed."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import pytest
import torch
from steps import repeating_all
from torch import Tensor, nn

import feedbackward as fb

ELSEWHERE = np.random.default_rng(0)


class Noisy(nn.Module):
    """Noise that torch's random state does not hold."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.generator, self.count = kind, np.random.default_rng(0), 0
        self.a, self.b, self.act, self.out = (
            nn.Linear(4, 6),
            nn.Linear(6, 6),
            nn.Tanh(),
            nn.Linear(6, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.kind == "elsewhere":
            h = h + torch.from_numpy(ELSEWHERE.normal(size=h.shape)).to(h)
        if self.kind == "numpy":
            h = h + torch.from_numpy(self.generator.normal(size=h.shape)).to(h)
        if self.kind == "python":
            h = h + random.random()
        if self.kind == "counter":
            self.count += 1
            h = h * self.count
        return self.out(torch.tanh(self.b(self.act(h))))


def test_forward_passes_that_cannot_be_repeated_are_refused() -> None:
    x = torch.randn(5, 4)
    learner = fb.attach(Noisy("elsewhere"), fb.DFA(), example=x)
    with pytest.raises(fb.AttachError, match=r"differ at '.*': some randomness does not come from"):
        learner.backward(x, lambda out: out.square().mean(), schedule="replay")
    assert all(p.grad is None for p in learner.model.parameters())


@pytest.mark.parametrize("hold", [True, False], ids=["held", "all"])
def test_a_pass_that_changes_later_is_noticed(hold: bool | str) -> None:
    """It was repeatable when it was rehearsed."""
    x = torch.randn(5, 4)
    model = Noisy("none")
    learner = fb.attach(model, fb.DFA(), example=x)
    with contextlib.nullcontext() if hold else repeating_all():
        learner.backward(x, lambda out: out.square().mean(), schedule="replay")
    model.kind = "elsewhere"
    with pytest.raises(fb.SiteError, match=r"gave another '.*' than the first.*zero them"):
        learner.backward(x, lambda out: out.square().mean(), schedule="replay")
