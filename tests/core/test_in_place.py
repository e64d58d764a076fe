"""A model that was attached in place trains by its rule whoever calls it, exactly as the learner does."""

from __future__ import annotations

import copy

import pytest
import torch
from pairs import PAIRS, Pair, assert_close, loss_fn
from steps import give_gradients
from torch import nn

import feedbackward as fb

RULES = (
    fb.DKP(),
    fb.DFA(),
    fb.DRTP(),
    fb.DGL(hidden=4),
    fb.KolenPollack.published(),
    fb.rules.FDFA(),
)


def grads(learner: fb.Learner) -> dict[str, torch.Tensor | None]:
    return {name: p.grad for name, p in learner.named_parameters()}


@pytest.mark.parametrize(
    "pair", [p for p in PAIRS if p.sites == "layers" and p.error_at is None], ids=str
)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_the_model_gets_the_gradients_of_the_learner(rule: fb.Rule, pair: Pair) -> None:
    x, y = pair.batch()
    model = pair.model()
    learner = fb.attach(copy.deepcopy(model), rule, example=x)
    placed = fb.attach(model, rule, example=x, in_place=True)
    for one, call in ((learner, learner), (placed, model)):
        torch.manual_seed(0)
        give_gradients(one, x, y, lambda out, y: loss_fn(y)(out), call=call)
    expected = grads(learner)
    for name, gradient in grads(placed).items():
        assert (gradient is None) == (expected[name] is None), name
        if gradient is not None:
            assert_close(gradient, expected[name], name, tolerance=1e-12)


def test_plain_passes_stay_plain() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(5, 4)
    truth = torch.autograd.grad(model(x).square().sum(), model[0].weight)[0]
    learner = fb.attach(model, fb.DFA(), example=x, in_place=True)
    with learner.exact():
        exact = torch.autograd.grad(model(x).square().sum(), model[0].weight)[0]
    assert torch.equal(exact, truth)
    cut = torch.autograd.grad(model(x).square().sum(), model[0].weight)[0]
    assert not torch.allclose(cut, truth)
    with torch.no_grad():
        assert torch.equal(model(x), learner(x))
    probe = fb.probe(learner, lambda out: out.square().sum(), x)
    assert probe.parameters["2.weight"].angle == pytest.approx(0, abs=0.1)
    assert learner.detach() is model
    after = torch.autograd.grad(model(x).square().sum(), model[0].weight)[0]
    assert torch.equal(after, truth)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_pass_that_raises_leaves_the_next_one_alone() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.act, self.two = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)
            self.fails = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.act(self.one(x))
            if self.fails:
                raise ValueError("not today")
            return self.two(h)

    x = torch.randn(5, 4)
    model = Sometimes()
    fb.attach(model, fb.KolenPollack.published(), example=x, in_place=True)
    model.fails = True
    with pytest.raises(ValueError, match="not today"):
        model(x)
    model.fails = False
    model(x).square().sum().backward()
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())
    assert model.one.weight.grad is not None


@pytest.mark.parametrize("schedule", ["joint", "replay"])
def test_schedules_of_a_model_in_place(schedule: str) -> None:
    pair = PAIRS[0]
    x, y = pair.batch()
    found = []
    for in_place in (False, True):
        learner = fb.attach(pair.model(), fb.DFA(), example=x, sites=pair.sites, in_place=in_place)
        learner.backward(x, loss_fn(y), schedule=schedule)
        found.append(grads(learner))
    for name, gradient in found[0].items():
        assert_close(found[1][name], gradient, name, tolerance=1e-12)


def test_the_models_zero_grad_clears_the_feedback_too() -> None:
    x = torch.randn(5, 4)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    learner = fb.attach(model, fb.DKP.published(), example=x, in_place=True)
    (B,) = learner.feedback.parameters()
    model(x).square().sum().backward()
    once = B.grad.clone()
    model(x).square().sum().backward()
    assert_close(B.grad, 2 * once)
    model.zero_grad()
    model(x).square().sum().backward()
    assert_close(B.grad, once)


@pytest.mark.parametrize("first", RULES, ids=lambda rule: rule.name)
def test_learners_of_one_model_train_it_as_if_each_were_alone(first: fb.Rule) -> None:
    pair = PAIRS[0]
    x, y = pair.batch()
    model, rules = pair.model(), (first, fb.DFA(), fb.DKP())
    alone = [
        fb.attach(copy.deepcopy(model), rule, example=x, seed=i) for i, rule in enumerate(rules)
    ]
    shared = [fb.attach(model, rule, example=x, seed=i) for i, rule in enumerate(rules)]
    for i in (0, 1, 2, 0):
        found = []
        for learner in (alone[i], shared[i]):
            learner.zero_grad()
            torch.manual_seed(0)
            give_gradients(learner, x, y, lambda out, y: loss_fn(y)(out))
            found.append(grads(learner))
        assert found[0].keys() == found[1].keys()
        for name, gradient in found[0].items():
            assert (gradient is None) == (found[1][name] is None), name
            assert gradient is None or torch.equal(gradient, found[1][name]), name


def test_a_model_in_place_has_one_learner() -> None:
    pair = PAIRS[0]
    (x, _), model = pair.batch(), pair.model()
    placed = fb.attach(model, fb.DFA(), example=x, in_place=True)
    for in_place in (False, True):
        with pytest.raises(fb.AttachError, match="trains in place by another learner"):
            fb.attach(model, fb.DKP(), example=x, in_place=in_place)
    placed.detach()
    learner = fb.attach(model, fb.DKP(), example=x)
    with pytest.raises(fb.AttachError, match="has a learner already"):
        fb.attach(model, fb.DFA(), example=x, in_place=True)
    learner.detach()
    fb.attach(model, fb.DFA(), example=x, in_place=True)
