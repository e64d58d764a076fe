"""What records a pass gets the plain network, or an error; and nobody trains for long without the phase."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call

import feedbackward as fb

X, Y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.mark.parametrize("in_place", [False, True])
def test_export_of_a_training_pass_is_refused(in_place: bool) -> None:
    learner = fb.attach(net(), fb.DKP(), example=X, in_place=in_place)
    called = learner.model if in_place else learner
    with pytest.raises(Exception, match=r"fb\.parallel\.pipeline"):
        torch.export.export(called.train(), (X,))
    program = torch.export.export(called.eval(), (X,))
    torch.testing.assert_close(program.module()(X), learner.model(X))
    # nothing is made of the feedback
    assert not [n.name for n in program.graph.nodes if "feedback" in n.name and n.users]


def test_pipelining_by_tracing_is_refused() -> None:
    pipelining = pytest.importorskip("torch.distributed.pipelining")
    learner = fb.attach(net(), fb.DKP(), example=X)
    spec = {"model.2": pipelining.SplitPoint.BEGINNING}
    with pytest.raises(RuntimeError) as error:
        pipelining.pipeline(learner, (X,), split_spec=spec)
    assert "fb.parallel.pipeline" in str(error.value.__cause__)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tracing() -> None:
    learner = fb.attach(net(), fb.DKP(), example=X)
    with pytest.raises(fb.FeedbackError, match="evaluation mode"):
        torch.jit.trace(learner.train(), X)
    traced = torch.jit.trace(learner.eval(), X)
    torch.testing.assert_close(traced(X), learner.model(X))


def test_symbolic_tracing() -> None:
    learner = fb.attach(net(), fb.DKP(), example=X)
    with pytest.raises(fb.FeedbackError, match="evaluation mode"):
        torch.fx.symbolic_trace(learner.train())
    torch.testing.assert_close(torch.fx.symbolic_trace(learner.model)(X), learner.model(X))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("what", [lambda learner: learner, lambda learner: learner.model])
@pytest.mark.parametrize("rule", [fb.DFA(), fb.FA()], ids=str)
def test_scripting_is_refused_until_the_learner_is_detached(rule: fb.Rule, what) -> None:  # type: ignore[no-untyped-def]
    learner = fb.attach(net(), rule, example=X)
    with pytest.raises(fb.FeedbackError, match=r"script what `learner\.detach\(\)` gives back"):
        torch.jit.script(what(learner))
    hooks = [h for m in learner.model.modules() for h in m._forward_hooks.values()]
    assert all(getattr(hook, "__name__", "none") == "none" for hook in hooks)
    model = learner.detach()
    torch.testing.assert_close(torch.jit.script(model)(X), model(X))


def loss(learner: fb.Learner, weights: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor):  # type: ignore[no-untyped-def]
    if learner.attached.needs_target:
        learner.target(y)
    return nn.functional.cross_entropy(functional_call(learner, weights, (x,)), y)


RULES = [fb.DFA(), fb.DKP(), fb.DRTP(), fb.DGL(hidden=0), fb.FA(), fb.KolenPollack()]
EACH = [
    fb.DFA(),
    fb.DKP.published(),
    fb.DRTP(),
    fb.DGL(hidden=0),
    fb.FA(),
    fb.KolenPollack(),
    fb.rules.RecLRA(),
]


def given(learner: fb.Learner) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor | None]]:
    """The weights, and their gradients by a backward pass."""
    loss(learner, {}, X, Y).backward()
    weights = {name: p.detach().clone() for name, p in learner.named_parameters()}
    return weights, {name: p.grad for name, p in learner.named_parameters()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor | None]) -> None:
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(
            found[name], grad if grad is not None else torch.zeros_like(found[name]), msg=name
        )


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_the_gradient_of_a_function_is_that_of_a_backward_pass(rule: fb.Rule) -> None:
    learner = fb.attach(net(), rule, example=X)
    weights, expected = given(learner)
    assert_equal(torch.func.grad(lambda w: loss(learner, w, X, Y))(weights), expected)
    _, pullback = torch.func.vjp(lambda w: loss(learner, w, X, Y), weights)
    (found,) = pullback(torch.ones((), dtype=X.dtype))
    assert_equal(found, expected)


@pytest.mark.parametrize("rule", EACH, ids=lambda rule: rule.name)
def test_gradients_of_each_sample(rule: fb.Rule) -> None:
    """They are those of the samples one by one, and their mean is that of the batch."""
    learner = fb.attach(net(), rule, example=X)
    weights, expected = given(learner)
    of_one = torch.func.grad(lambda w, x, y: loss(learner, w, x, y))
    found = torch.func.vmap(of_one, (None, 0, 0))(weights, X[:, None], Y[:, None])
    assert_equal({name: g.mean(0) for name, g in found.items()}, expected)
    for i in range(len(X)):
        single = of_one(weights, X[i : i + 1], Y[i : i + 1])
        assert_equal({name: g[i] for name, g in found.items()}, dict(single))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_forward_mode_is_refused(rule: fb.Rule) -> None:
    learner = fb.attach(net(), rule, example=X)
    refused = pytest.raises(fb.FeedbackError, match=r"forward-mode .*learner\.exact\(\)")
    with refused:
        torch.func.jvp(lambda x: loss(learner, {}, x, Y), (X,), (X,))
    with refused, torch.autograd.forward_ad.dual_level():
        loss(learner, {}, torch.autograd.forward_ad.make_dual(X, X), Y)
    with learner.exact():
        jacobian = torch.func.jacrev(learner)(X)
    assert jacobian.shape == (6, 3, 6, 4)


def test_transforms_refused_by_rule() -> None:
    for rule in (fb.rules.BRSF(), fb.rules.IFA()):
        learner = fb.attach(net(), rule, example=X)
        with pytest.raises(fb.FeedbackError, match=rf"torch\.func does not work with {rule.label}"):
            torch.func.grad(lambda w: loss(learner, w, X, Y))(dict(learner.named_parameters()))  # noqa: B023


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_call_with_other_weights_trains_those(rule: fb.Rule) -> None:
    """As meta-learning calls a model: the gradients are those of a learner that has these weights."""
    learner = fb.attach(net(), rule, example=X)
    weights = {n: (1.1 * p).detach().requires_grad_() for n, p in learner.named_parameters()}
    loss(learner, weights, X, Y).backward()
    assert all(p.grad is None for p in learner.parameters())
    learner.load_state_dict(weights, strict=False)
    loss(learner, {}, X, Y).backward()
    for name, p in learner.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(weights[name].grad, p.grad, msg=name)


def steps(learner: fb.Learner, count: int) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(count):
            if learner.attached.needs_target:
                learner.target(Y)
            nn.functional.cross_entropy(learner(X), Y).backward()
    return [str(w.message) for w in caught if "feedback_step" in str(w.message)]


@pytest.mark.parametrize(
    "rule", [fb.rules.FDFA(), fb.rules.WeightMirror(), fb.rules.DDTP()], ids=lambda rule: rule.name
)
def test_a_phase_that_nobody_runs_is_told_once(rule: fb.Rule) -> None:
    learner = fb.attach(net(), rule, example=X)
    (said,) = steps(learner, 60)
    assert rule.label in said
    assert not steps(fb.attach(net(), rule, example=X), 10)


def test_a_phase_that_was_run_or_is_not_wanted_is_not_told() -> None:
    learner = fb.attach(net(), fb.rules.FDFA(), example=X)
    learner.feedback_step(X)
    assert not steps(learner, 60)
    frozen = fb.attach(net(), fb.rules.FDFA(fb.Dense()), example=X)
    frozen.feedback.requires_grad_(False)
    assert not steps(frozen, 60)
    assert not steps(fb.attach(net(), fb.DKP(), example=X), 60)


@pytest.mark.parametrize("rule", [fb.DRTP(), fb.DGL(hidden=0)], ids=lambda rule: rule.name)
def test_targets_behind_a_mask_send_nothing(rule: fb.Rule) -> None:
    """Label -100: as if the row were not there. DRTP divides by all rows, a loss by those that count."""
    y = Y.clone()
    y[3:] = -100
    found = []
    for x, labels in ((X, y), (X[:3], Y[:3])):
        learner = fb.attach(net(), rule, example=X)
        everything = isinstance(rule, fb.DRTP) and len(x) == 6
        learner.target(labels, 2.0 if everything else 1.0)
        nn.functional.cross_entropy(learner(x), labels).backward()
        found.append([p.grad for p in learner.parameters()])
    for masked, alone in zip(*found, strict=True):
        torch.testing.assert_close(masked, alone)


@pytest.mark.parametrize("rule", [fb.DRTP(), fb.DGL(hidden=0)], ids=lambda rule: rule.name)
def test_targets_of_accumulated_batches_have_the_scale_of_the_loss(rule: fb.Rule) -> None:
    found = []
    for parts in (1, 2):
        learner = fb.attach(net(), rule, example=X)
        for x, y in zip(X.chunk(parts), Y.chunk(parts), strict=True):
            learner.target(y, 1 / parts)
            (nn.functional.cross_entropy(learner(x), y) / parts).backward()
        found.append([p.grad for p in learner.parameters()])
    for whole, accumulated in zip(*found, strict=True):
        torch.testing.assert_close(accumulated, whole)
