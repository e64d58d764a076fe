"""Transformers whose blocks read the same activity."""

from __future__ import annotations

import pytest
import torch

import feedbackward as fb
from feedbackward.experiment.nets import build
from feedbackward.experiment.nets.transformer import Transformer

TOKENS = torch.randint(7, (2, 5))


def test_a_stage_adds_every_branch_of_its_activity():
    torch.manual_seed(0)
    model = Transformer((5,), 7, width=8, depth=4, heads=2, stages=2).double()
    h = model.embed(TOKENS)
    for stage in model.blocks:
        h = h + sum(b.attention(b.norm1(h)) + b.ffn(b.norm2(h)) for b in stage.blocks)
    torch.testing.assert_close(model(TOKENS), model.head(model.norm(h)))


def test_weights_are_those_of_blocks_one_after_another():
    models = []
    for stages in (None, 1, 2, 4):
        torch.manual_seed(0)
        models.append(Transformer((5,), 7, width=8, depth=4, heads=2, stages=stages))
    first, *others = (list(m.parameters()) for m in models)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_division_that_does_not_come_out_is_refused():
    with pytest.raises(ValueError, match="4 blocks cannot be divided into 3 stages"):
        Transformer((5,), 7, depth=4, stages=3)


@pytest.mark.parametrize("branches", [1, 2, 3])
def test_highway_kp_needs_as_many_branches_as_there_are_stages(branches):
    """Then it is backprop, if B = W: no path goes through two branches of one stage."""
    torch.manual_seed(0)
    model = build("transformer6_stages3", (5,), 7, task="language_model").double()
    rule = fb.rules.HighwayKP(branches=branches)
    learner = fb.attach(model, rule, example=TOKENS, sites="layers")
    for edge in learner.graph.edges:
        learner.feedback_of(edge).data.copy_(dict(model.named_parameters())[edge.shares])
    grads = []
    for _ in ("by the rule", "by backprop"):
        model.zero_grad()
        (model(TOKENS) if grads else learner(TOKENS)).logsumexp(-1).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
        learner.detach()
    same = all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(*grads, strict=True))
    assert same == (branches == 3)
