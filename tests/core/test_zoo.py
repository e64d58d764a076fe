"""What must hold on every model of the zoo: nothing leaks, nothing is left untrained, nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from zoo import ZOO, Case, build, loss_of, run

import feedbackward as fb

every_case = pytest.mark.parametrize("case", ZOO, ids=str)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def attached(case: Case, rule: fb.Rule) -> tuple[fb.Learner, object]:
    model, example = build(case)
    return fb.attach(model, rule, example=example, **case.options), example


@every_case
def test_plan(case: Case) -> None:
    learner, _ = attached(case, fb.DFA())
    if case.sites is not None:
        assert tuple(site.name for site in learner.sites) == case.sites
    assert bool(learner.plan.shared) == case.overlap
    assert learner.plan.unreached == ()
    segments = (*learner.plan.segments, learner.plan.head)
    assert {name for s in segments for name in s.parameters} == set(
        dict(learner.model.named_parameters())
    )
    assert all(segment.parameters for segment in segments), (
        "an empty segment: a tensor was cut twice"
    )
    assert len(learner.feedback.state_dict()) == len(learner.sites)
    shown = [
        name for name in dict(learner.model.named_parameters()) if f"{name} in " in str(learner)
    ]
    assert set(shown) <= set(learner.plan.shared)
    assert len(shown) >= min(4, len(learner.plan.shared))  # of many some are shown


@every_case
def test_forward_is_bit_identical_and_attach_leaves_no_trace(case: Case) -> None:
    model, example = build(case)
    plain, modes = copy.deepcopy(model), [m.training for m in model.modules()]
    state = torch.get_rng_state()
    learner = fb.attach(model, fb.DKP.published(), example=example, **case.options)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert all(
        torch.equal(a, b)
        for a, b in zip(plain.state_dict().values(), model.state_dict().values(), strict=True)
    )
    assert list(model.state_dict()) == list(plain.state_dict())
    for _ in range(
        2
    ):  # training mode: batch statistics and dropout masks of two passes in a row, then evaluation
        for call in (learner, model):
            torch.manual_seed(1)
            got = run(call, example)
            torch.manual_seed(1)
            torch.testing.assert_close(got, run(plain, example), rtol=0, atol=0)
        assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), model.buffers(), strict=True))
        learner.eval()
        plain.eval()


@every_case
def test_without_feedback_only_the_head_learns(case: Case) -> None:
    learner, example = attached(case, fb.DKP.published(operator=fb.Dense("zeros")))
    loss_of(case, run(learner, example)).backward()
    got = gradients(learner.model)
    for name in dict(learner.model.named_parameters()):
        if name in learner.plan.head.parameters:
            assert got[name].abs().max() > 1e-8, name
        else:
            assert name not in got or not got[name].any(), f"the true gradient leaked to {name}"
    for edge in learner.graph.edges:
        assert learner.feedback_of(edge).grad.abs().max() > 0, edge.key


@every_case
def test_one_site_feeds_its_own_segment_only(case: Case) -> None:
    learner, example = attached(case, fb.DKP.published())
    plan = learner.plan
    for edge, segment in zip(learner.graph.edges, plan.segments, strict=True):
        with torch.no_grad():
            for other in learner.graph.edges:
                learner.feedback_of(other).fill_(0.1 if other is edge else 0.0)
        learner.zero_grad()
        loss_of(case, run(learner, example)).backward()
        reached = {name for name, grad in gradients(learner.model).items() if grad.any()}
        assert reached <= {*segment.parameters, *plan.head.parameters}, segment.site


@every_case
def test_every_parameter_learns(case: Case) -> None:
    learner, example = attached(case, fb.DFA())
    before = copy.deepcopy(learner.model.state_dict())
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    loss_of(case, run(learner, example)).backward()
    optimizer.step()
    got = gradients(learner.model)
    after = learner.model.state_dict()
    for name, p in learner.model.named_parameters():
        assert torch.isfinite(got[name]).all(), name
        if (
            name in case.silent
        ):  # a bias before batch norm, or a key's bias: zero in theory, for any signal
            assert got[name].abs().max() < 1e-5, name
        else:
            assert got[name].abs().max() > 1e-6, name
            assert not torch.equal(before[name], after[name]), name
        assert p.grad.dtype == p.dtype


@every_case
def test_exact_and_detach_give_backprop_back(case: Case) -> None:
    model, example = build(case)
    start, plain = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    seeded_step(case, plain, example)
    learner = fb.attach(model, fb.DKP.published(), example=example, **case.options)
    with learner.exact():
        seeded_step(case, learner, example)
    assert_same(model, plain)
    for call in (model, learner.detach()):  # past the learner, then without it
        model.zero_grad()
        model.load_state_dict(start)
        seeded_step(case, call, example)
        assert_same(model, plain)
    assert not any(
        m._forward_hooks or m._forward_pre_hooks
        for m in model.modules()
        if "Parametri" not in str(type(m))
    )


def seeded_step(case: Case, model: nn.Module, example: object) -> None:
    torch.manual_seed(2)
    loss_of(case, run(model, example)).backward()


def assert_same(model: nn.Module, plain: nn.Module) -> None:
    got, expected = gradients(model), gradients(plain)
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        assert torch.equal(got[name], grad), name
