"""EBD, sDFA and flipped feedback: what defines each, from the papers' equations (signals of one step: the rows)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pairs import F64, MLP, TOKENS, assert_close, grads, loss_fn, signals, step
from torch import nn

import feedbackward as fb
from feedbackward.experiment.nets.transformer import Transformer

# --- EBD -------------------------------------------------------------------------------------------------------


def test_ebd_feedback_is_the_moving_average_of_the_correlation() -> None:
    """R <- lambda R + (1 - lambda) / N sum_n g(h_n) eps_n^T while the network trains, with eps = softmax - onehot."""
    memory, forget = 0.8, 0.25
    learner = MLP.attach(fb.rules.EBD(forget=forget))
    B = learner.feedback_of(learner.graph.edges[1])
    model = learner.model
    groups = fb.param_groups(learner, model={"lr": 0.3}, feedback={"lr": (1 - memory) / forget})
    optimizer = torch.optim.SGD(groups, lr=0.1)
    R = B.detach().numpy().T.copy()
    for t in range(6):
        x, y = MLP.batch(seed=t)
        with torch.no_grad():
            h = model[:4](x).numpy()
            p = torch.softmax(model(x), 1).numpy()
        eps = p - np.eye(3)[y.numpy()]
        R = memory * R + (1 - memory) / len(h) * sum(np.outer(h[n], eps[n]) for n in range(len(h)))
        optimizer.zero_grad()
        step(learner, x, y)
        optimizer.step()
    assert_close(B.detach(), R.T)


def test_ebd_signal_descends_the_correlation() -> None:
    """For B = e^T h the signal is the gradient of half of |e^T h|^2 by h; DKP's feedback is minus a sum of the same."""
    x, y = MLP.batch()
    after = {}
    for rule in (
        fb.rules.EBD(forget=1.0, operator=fb.Dense("zeros")),
        fb.DKP.published(operator=fb.Dense("zeros")),
    ):
        learner = MLP.attach(rule)
        optimizer = torch.optim.SGD(learner.feedback.parameters(), lr=1.0)
        step(learner, x, y)
        optimizer.step()
        after[rule.name] = signals(learner, x, y)["act2"]
    model = MLP.model()
    e = ((torch.softmax(model(x), 1) - nn.functional.one_hot(y, 3)) / len(x)).detach()
    h = model[:4](x).detach().requires_grad_()
    (truth,) = torch.autograd.grad((e.T @ h).square().sum() / 2, h)
    assert_close(after["ebd"], truth)
    assert_close(after["dkp"], -truth)


# --- sDFA ------------------------------------------------------------------------------------------------------


def test_the_sign_of_the_error_is_a_projection_of_the_target() -> None:
    """For softmax and cross-entropy sign(e) = 1 - 2y; the scale of the loss is not seen."""
    learner = MLP.attach(fb.rules.SignDFA())
    x, y = MLP.batch()
    for factor in (1.0, 1e-3):
        got = signals(learner, x, y, lambda output, f=factor: f * loss_fn(y)(output))
        for edge in learner.graph.edges:
            B = learner.feedback_of(edge)
            expected = (1 - 2 * nn.functional.one_hot(y, 3).to(F64)) @ B / len(x)
            assert_close(got[edge.site.name], expected, edge.site.name)


def test_zero_signs_are_refused() -> None:
    with pytest.raises(fb.AttachError, match="zero feedback"):
        fb.rules.SignDFA(operator=fb.Dense("zeros"))


def test_an_error_of_zero_has_no_sign() -> None:
    learner = TOKENS.attach(fb.rules.SignDFA())
    x, y = TOKENS.batch()
    y[:, 2] = -100
    got = signals(learner, x, y)
    assert not got["act1"][:, 2].any()
    assert got["act1"][:, 1].all(1).any()


# --- the sign of the feedback ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule",
    [fb.DKP.published(), fb.DFA(), fb.DRTP(), fb.rules.FDFA.published(operator=fb.Dense())],
    ids=lambda r: r.name,
)
def test_flipped_negates_hidden_gradients_and_nothing_else(rule: fb.Rule) -> None:
    x, y = MLP.batch()
    found = []
    for used in (rule, fb.rules.Flipped(rule)):
        learner = MLP.attach(used)
        torch.manual_seed(5)
        if learner.attached.needs_target:
            learner.target(y)
        step(learner, x, y)
        found.append((grads(learner.model), grads(learner.feedback)))
    (plain, feedback), (flipped, same) = found
    for name, gradient in plain.items():
        assert_close(
            flipped[name], gradient if name in MLP.head() else -gradient, name, tolerance=0.0
        )
    assert feedback.keys() == same.keys()
    for name, gradient in feedback.items():
        assert_close(same[name], gradient, name, tolerance=0.0)


def test_flipped_refuses_what_has_no_one_sign() -> None:
    for rule in (fb.FA(), fb.Frozen(), fb.BP(), fb.DGL()):
        with pytest.raises(fb.AttachError, match=r"cannot be flipped.*Flip a direct rule"):
            MLP.attach(fb.rules.Flipped(rule))
    with pytest.raises(
        fb.AttachError, match=r"needs an instance of a Rule, for example fb\.DKP\(\)"
    ):
        fb.rules.Flipped(fb.DKP)  # type: ignore[arg-type]


# --- what a loss scale cannot reach ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n, rule in fb.RULES.items() if not rule.linear])
def test_rules_that_do_not_scale_with_the_loss_refuse_fp16(name: str) -> None:
    learner = fb.attach(MLP.model().float(), fb.RULES[name](), example=MLP.batch()[0].float())
    x, y = MLP.batch()
    learner.target(y)
    with (
        torch.autocast("cpu", torch.float16),
        pytest.raises(fb.FeedbackError, match=r"GradScaler .* bf16"),
    ):
        learner(x.float())
    learner.target(y)
    with torch.autocast("cpu", torch.bfloat16):
        learner(x.float())


def test_rules_that_send_targets_do_not_scale_with_the_loss() -> None:
    assert {"drtp", "dgl", "sign_dfa", "ebd"} <= {
        n for n, rule in fb.RULES.items() if not rule.linear
    }
    assert not [n for n, rule in fb.RULES.items() if rule.linear and rule.needs == "target"]


def test_the_identity_is_what_a_skip_path_does_to_an_error() -> None:
    """Backprop where the branches above are silent; where they speak, the part of backprop that passes none of them."""
    torch.manual_seed(0)
    x, y = torch.randint(9, (4, 5)), torch.randint(9, (4, 5))
    net = Transformer((5,), 9, width=8, depth=3).double()
    for block in net.blocks[1:]:
        for silent in (block.attention.out, block.ffn.out):
            nn.init.zeros_(silent.weight)
    found = []
    for rule in (fb.BP(), fb.DFA(operator=fb.Dense("identity"))):
        learner = fb.attach(net, rule, example=x, sites="blocks", error_at="blocks.2")
        net.zero_grad()
        nn.functional.cross_entropy(learner(x).flatten(0, 1), y.flatten()).backward()
        found.append([p.grad.clone() for p in net.parameters()])
    for exact, sent in zip(*found, strict=True):
        torch.testing.assert_close(sent, exact, rtol=1e-10, atol=1e-12)
