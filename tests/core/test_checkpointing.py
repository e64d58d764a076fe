"""Activation checkpointing: the repeated part of a pass is cut as the first time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from wired import X

import feedbackward as fb
from feedbackward.engine.checkpoints import KNOWN

RULES = [fb.DFA(), fb.DKP.published(), fb.DKP.published(center=True), fb.Frozen()]


class Part(nn.Module):
    """Two layers whose activations are thrown away and computed again in backward."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode, self.a, self.act, self.b = mode, nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)

    def body(self, x: Tensor) -> Tensor:
        return self.b(nn.functional.dropout(self.act(self.a(x)), 0.2, self.training))

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "kept":
            return self.body(x)
        return checkpoint(self.body, x, use_reentrant=self.mode == "reentrant")


def net(mode: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 6), nn.Tanh(), Part(mode), nn.Tanh(), Part(mode), nn.Tanh(), nn.Linear(6, 3)
    )


def step(model: nn.Module) -> list[Tensor | None]:
    torch.manual_seed(1)
    model(X).square().sum().backward()
    return [p.grad for p in model.parameters()]


def assert_same(a: list[Tensor | None], b: list[Tensor | None]) -> None:
    assert any(grad is not None for grad in a)
    for left, right in zip(a, b, strict=True):
        assert (left is None and right is None) or torch.equal(left, right)


@pytest.mark.parametrize("sites", ["layers", ["1", "2.act", "3"], ["1", "3"]], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_gradients_are_those_without_checkpointing(rule: fb.Rule, sites) -> None:
    kept, repeated = (
        fb.attach(net(mode), rule, example=X, sites=sites) for mode in ("kept", "repeated")
    )
    assert_same(step(repeated), step(kept))


@pytest.mark.parametrize("schedule", ["joint", "eager"])
@pytest.mark.parametrize("rule", [fb.DGL(hidden=4), fb.DRTP()], ids=str)
def test_local_losses_are_not_repeated(rule: fb.Rule, schedule: str) -> None:
    y, made = torch.arange(len(X)) % 3, []
    for mode in ("kept", "repeated"):
        learner = fb.attach(net(mode), rule, example=X)
        torch.manual_seed(1)
        learner.target(y)
        learner.backward(X, lambda out: nn.functional.cross_entropy(out, y), schedule)
        made.append([p.grad for p in learner.parameters()] + list(learner.feedback.buffers()))
    assert_same(*made)


def test_an_evaluation_between_forward_and_backward() -> None:
    sites = ["1", "2.act", "3"]
    kept, repeated = (
        fb.attach(net(mode), fb.DKP.published(), example=X, sites=sites)
        for mode in ("kept", "repeated")
    )
    torch.manual_seed(1)
    out = repeated(X)
    with torch.no_grad():
        repeated(X)
        repeated.model(X)
    out.square().sum().backward()
    assert_same([p.grad for p in repeated.parameters()], step(kept))


def test_the_plain_model_stays_plain() -> None:
    """Exact passes, and the model called past the learner, after a pass that was cut."""
    model = net("repeated")
    learner = fb.attach(model, fb.DFA(), example=X)
    expected = step(net("kept"))
    step(learner)
    model.zero_grad()
    assert_same(step(model), expected)
    step(learner)
    model.zero_grad()
    with learner.exact():
        step(learner)
    assert_same([p.grad for p in model.parameters()], expected)


@pytest.mark.parametrize("sites", ["layers", ["1", "3"], ["2.act"], "blocks"], ids=str)
def test_reentrant_checkpoints_are_refused(sites) -> None:
    with pytest.raises(fb.AttachError, match=r"'2\.a' runs without gradients.*use_reentrant=False"):
        fb.attach(net("reentrant"), fb.DFA(), example=X, sites=sites)


@pytest.mark.skipif(not KNOWN, reason="torch does not say whether a checkpoint is in force")
@pytest.mark.parametrize("sites", [["1"], ["1", "2.act", "3", "4.a"]], ids=str)
@pytest.mark.parametrize("source", ["4.act", "4.b"])
@pytest.mark.parametrize("rule", RULES[:3], ids=str)
def test_a_source_inside_a_checkpoint(rule: fb.Rule, source: str, sites: list[str]) -> None:
    kept, repeated = (
        fb.attach(net(mode), rule, example=X, sites=sites, error_at=source)
        for mode in ("kept", "repeated")
    )
    assert_same(step(repeated), step(kept))


@pytest.mark.skipif(not KNOWN, reason="torch does not say whether a checkpoint is in force")
def test_a_source_inside_a_checkpoint_that_nothing_trains() -> None:
    made = []
    for mode in ("kept", "repeated"):
        model = net(mode)
        learner = fb.attach(model, fb.DFA(), example=X, sites=["1"], error_at="4.a")
        model[:4].requires_grad_(False)
        model[4].a.requires_grad_(False)
        made.append(step(learner))
    assert_same(*made)


def test_a_source_inside_a_checkpoint_is_refused_where_more_is_done_than_sending() -> None:
    learner = fb.attach(net("repeated"), fb.DFA(), example=X, sites=["1"], error_at="2.a")
    words = r"checkpoint repeats .*'2\.a'.*choose another error_at"
    with pytest.raises(fb.SiteError, match=words):
        learner.backward(X, lambda out: out.square().sum(), "replay")
    local = fb.attach(net("repeated"), fb.DGL(hidden=4), example=X, sites=["1"], error_at="2.a")
    local.target(torch.arange(len(X)) % 6)
    with pytest.raises(fb.SiteError, match=words):
        step(local)
