"""Layers whose activity is not the first argument: no true gradient travels through them behind the cuts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import feedbackward as fb


class Wrapped(nn.Linear):
    """A Linear that takes any arguments; `call` says what it makes of them."""

    def __init__(self, call: Callable[..., Tensor], size: int, out: int = 6) -> None:
        super().__init__(size, out)
        self.call = call

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.call(super().forward, *args, **kwargs)


def first(apply: Any, a: Any, x: Tensor) -> Tensor:
    return a @ apply(x)


def keyword(apply: Any, *, x: Tensor, scale: Any = 1.0) -> Tensor:
    return apply(x) * scale


def pair(apply: Any, both: tuple[Tensor, Tensor]) -> Tensor:
    return apply(both[1]) * both[0]


def named(apply: Any, inputs: dict[str, Tensor]) -> Tensor:
    return apply(inputs["x"]) * inputs["mask"]


def condition(apply: Any, c: Tensor, x: Tensor) -> Tensor:
    return apply(x) + c


def twice(apply: Any, a: Tensor, b: Tensor) -> Tensor:
    return apply(a) * b.mean(1, keepdim=True)


ROWS = torch.eye(7) + 0.1 * torch.rand(7, 7, generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(7) % 2).unsqueeze(1).float()
X = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))

# what a layer makes of its arguments, and how it is called with the activity h
CALLS: dict[str, tuple[Callable[..., Tensor], Callable[[nn.Module, Tensor], Tensor]]] = {
    "adjacency first": (first, lambda layer, h: layer(ROWS, h)),
    "sparse adjacency first": (first, lambda layer, h: layer(ROWS.to_sparse(), h)),
    "adjacency and activity by keyword": (first, lambda layer, h: layer(a=ROWS, x=h)),
    "adjacency first, activity by keyword": (first, lambda layer, h: layer(ROWS, x=h)),
    "by keyword": (keyword, lambda layer, h: layer(x=h)),
    "scale before, by keyword": (keyword, lambda layer, h: layer(scale=MASK, x=h)),
    "number by keyword": (keyword, lambda layer, h: layer(x=h, scale=0.5)),
    "mask first, in a tuple": (pair, lambda layer, h: layer((MASK, h))),
    "in a dict": (named, lambda layer, h: layer({"mask": MASK, "x": h})),
    "condition first": (condition, lambda layer, h: layer(torch.ones(7, 6), h)),
    "the same twice": (twice, lambda layer, h: layer(h, h)),
    "the same twice, once by keyword": (twice, lambda layer, h: layer(h, b=h)),
}


class Net(nn.Module):
    """Three such layers with functional activations between them, so that the cuts lie at the layers' inputs."""

    def __init__(self, name: str) -> None:
        super().__init__()
        make, self.given = CALLS[name]
        self.a, self.b, self.c = Wrapped(make, 4), Wrapped(make, 6), Wrapped(make, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b, self.c):
            x = F.relu(self.given(layer, x))
        return self.out(x)


def loud(net: nn.Module, learner: fb.Learner, *inputs: Tensor) -> set[str]:
    """The layers with a gradient when all feedback is zero: those above the last cut, unless one leaks."""
    for edge in learner.graph.edges:
        learner.feedback_of(edge).data.zero_()
    learner(*inputs).square().sum().backward()
    return {
        n.split(".")[0] for n, p in net.named_parameters() if p.grad is not None and p.grad.any()
    }


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("rule", [fb.DFA(), fb.DKP()], ids=str)
def test_the_activity_is_cut_wherever_it_is_given(name: str, rule: fb.Rule) -> None:
    torch.manual_seed(0)
    net = Net(name)
    learner = fb.attach(net, rule, example=X)
    assert [site.shape for site in learner.sites] == [(6,)] * 3
    assert learner.plan.unreached == ()
    assert loud(net, learner, X) == {"out"}


def test_an_activity_and_a_style_that_is_learned_are_both_cut() -> None:
    class Styled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.style, self.a = nn.Linear(4, 6), nn.Linear(4, 6)
            self.b, self.out = Wrapped(condition, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.b(self.style(x).tanh(), self.a(x).relu()).relu())

    torch.manual_seed(0)
    net = Styled()
    learner = fb.attach(net, fb.DFA(), example=X)
    assert len(learner.sites) == 3
    assert loud(net, learner, X) == {"out"}


# what a layer may be given that is a weight and no activity
WEIGHTS: dict[str, Callable[[nn.Parameter], Tensor]] = {
    "a number of a softmax": lambda p: p.softmax(0)[1],
    "a number times another": lambda p: (2 * p.sum()).exp(),
    "a softmax": lambda p: p.softmax(0),
    "a squared norm": lambda p: p.square() / p.square().sum(),
    "a table that is turned": lambda p: p.view(6, 1).t().tanh(),
    "the parameter": lambda p: p,
}


@pytest.mark.parametrize("size", [7, 6])
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_that_is_given_first_is_no_activity(name: str, size: int) -> None:
    """Also where it is as long as the batch."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(6))
            self.a, self.b = Wrapped(condition, 4), Wrapped(condition, 6)
            self.out = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            for layer in (self.a, self.b):
                x = F.relu(layer(WEIGHTS[name](self.scale), x))
            return self.out(x)

    torch.manual_seed(0)
    net = Mixed()
    learner = fb.attach(net, fb.DFA(), example=X[:size])
    assert [site.name for site in learner.sites] == ["b.input", "out.input"]
    assert loud(net, learner, X[:size]) == {"out"}
    for edge in learner.graph.edges:
        learner.feedback_of(edge).data.normal_()
    learner(X[:size]).square().sum().backward()
    assert net.scale.grad.any()


def test_a_call_without_the_activity_is_refused() -> None:
    class Loose(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.a(ROWS, x))
            h = self.b(ROWS, h) if self.whole else self.b(a=h, x=3.0)
            return self.out(h)

    net = Loose("adjacency first")
    net.whole = True
    learner = fb.attach(net, fb.DFA(), example=X)
    net.whole = False
    with pytest.raises(fb.FeedbackError, match="'b' did not get"):
        learner(X)


def test_a_chain_feeds_a_layer_that_is_called_by_keyword() -> None:
    """With B = W it is backprop."""

    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(input=F.relu(self.b(input=F.relu(self.a(input=x)))))

    torch.manual_seed(0)
    net, x = Keyword().double(), X.double()
    learner = fb.attach(net, fb.rules.FA(), example=x)
    with torch.no_grad():
        for edge in learner.graph.edges:
            learner.feedback_of(edge).copy_(net.get_parameter(edge.site.weight))
    found = torch.autograd.grad(learner(x).square().sum(), list(net.parameters()))
    with learner.exact():
        expected = torch.autograd.grad(learner(x).square().sum(), list(net.parameters()))
    assert len(learner.sites) == 2
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)


class Named(nn.Linear):
    """A Linear whose activity is one of several named arguments."""

    def forward(self, x: Tensor, style: Tensor, more: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(x) * style + more["shift"] + more["scale"]


class Reordered(nn.Module):
    """Layers called with keywords and dicts, in the order and the manner that `turn` says."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (Named(n, 6) for n in (4, 6, 6))
        self.out, self.turn = nn.Linear(6, 3), (0, 0, 0)

    def given(self, layer: nn.Module, h: Tensor) -> Tensor:
        extra = torch.tanh(h.detach().mean(1, keepdim=True))
        more = [("shift", extra), ("scale", extra * 2)]
        keywords = [("style", extra), ("more", dict(more[:: -1 if self.turn[0] else 1])), ("x", h)]
        places = {"x": 0, "style": 1, "more": 2}
        by_position = self.turn[2]
        args = [value for _, value in sorted(keywords, key=lambda k: places[k[0]])][:by_position]
        rest = [k for k in keywords if places[k[0]] >= by_position][:: -1 if self.turn[1] else 1]
        return layer(*args, **dict(rest))

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b, self.c):
            x = torch.tanh(self.given(layer, x))
        return self.out(x)


@examples(20, 200)
@given(*[st.tuples(st.booleans(), st.booleans(), st.integers(0, 3))] * 2)
def test_arguments_may_come_in_another_order_and_manner_than_on_the_example(
    first_turn: tuple[bool, bool, int], turn: tuple[bool, bool, int]
) -> None:
    torch.manual_seed(0)
    model = Reordered().double()
    model.turn, x = first_turn, X.double()
    learner = fb.attach(model, fb.DFA(), example=x)
    learner(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    learner.zero_grad()
    model.turn = turn
    learner(x).square().sum().backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(found) == len(expected) == 8
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
