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


class Crossing(nn.Module):
    """Hands on something beside the activity, which the part above the cuts uses as well."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.low, self.mid, self.out = Handing(what), nn.Linear(6, 6), nn.Linear(6, 3)
        self.act, self.recur = nn.Tanh(), nn.GRU(6, 6, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h, beside = self.low(x, mask)
        if self.what == "packed":
            packed = nn.utils.rnn.pack_padded_sequence(
                h[:, None].expand(-1, 3, -1), beside, True, False
            )
            h = self.recur(packed)[1][0]
        h = self.act(self.mid(torch.tanh(h)))
        if self.what == "indices":
            return self.out(h) + nn.functional.one_hot(beside, 3)
        return self.out(h) * (1 if self.what == "packed" else beside)


class Handing(nn.Linear):
    def __init__(self, what: str) -> None:
        super().__init__(4, 6)
        self.what = what

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        beside = {
            "mask": lambda: mask,
            "comparison": lambda: x[:, :1] > 0,
            "indices": lambda: x[:, :3].argmax(1),
            "packed": lambda: torch.tensor([3, 1, 2, 3, 2]),
            "numbers": lambda: x[:, :1] * 2,
            "changed in place": lambda: mask.mul_(2),
        }[self.what]()
        return super().forward(x), beside


@pytest.mark.parametrize("rule", [fb.DFA(), fb.DKP()], ids=str)
@pytest.mark.parametrize(
    "what", ["mask", "comparison", "indices", "packed", "numbers", "changed in place"]
)
def test_what_crosses_the_cuts_is_kept_or_refused(what: str, rule: fb.Rule) -> None:
    torch.manual_seed(0)
    model, x, mask = Crossing(what), torch.randn(5, 4), torch.rand(5, 1)
    learner = fb.attach(model, rule, example=(x, mask), sites=["mid", "act"])

    def run(schedule: str, **options: bool) -> list[Tensor | None]:
        learner.zero_grad()
        learner.backward((x, mask), lambda out: out.square().mean(), schedule, **options)
        return [p.grad for p in learner.parameters()]

    expected = run("joint")
    if what in ("numbers", "changed in place"):
        with pytest.raises(fb.SiteError, match=r"gave another 'out.*keep_inputs=False"):
            run("replay", keep_inputs=True)
        assert all(p.grad is None for p in model.parameters())
        return
    for found, grad in zip(run("replay", keep_inputs=True), expected, strict=True):
        assert (found is None) == (grad is None)
        if grad is not None:
            torch.testing.assert_close(found, grad)


class Closing(nn.Module):
    """Its output is a function, which holds what nobody sees. `noisy`: more than what the source is made of."""

    def __init__(self, noisy: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.noisy = noisy

    def forward(self, x: Tensor) -> object:
        h = self.a(x)
        y = self.c(torch.tanh(self.b(torch.tanh(h))))
        return lambda: y * h[:, :1] if self.noisy else y


@pytest.mark.parametrize("noisy", [False, True])
def test_an_output_that_is_a_function_is_judged_by_the_loss(noisy: bool) -> None:
    torch.manual_seed(0)
    model, x = Closing(noisy), torch.randn(5, 4)
    sites = ["a", "b"] if not noisy else ["b"]
    learner = fb.attach(model, fb.DFA(), example=x, error_at="c", sites=sites)

    def run(schedule: str, **options: bool) -> list[Tensor | None]:
        learner.zero_grad()
        learner.backward(x, lambda out: out().square().mean(), schedule, **options)
        return [p.grad for p in learner.parameters()]

    expected = run("joint")
    if noisy:
        # the part above the cuts reads an activity below them
        with pytest.raises(fb.SiteError, match=r"gave another 'loss'.*keep_inputs=False"):
            run("replay", keep_inputs=True)
        assert all(p.grad is None for p in model.parameters())
        return
    for found, grad in zip(run("replay", keep_inputs=True), expected, strict=True):
        torch.testing.assert_close(found, grad)
