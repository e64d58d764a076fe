"""Training steps in every order that a loop may take them, and what is refused."""

from __future__ import annotations

import copy

import oracles
import pytest
import torch
from pairs import CONV, F64, MLP, TOKENS, Pair, assert_close, exact_grads, grads, loss_fn, signals
from rows import DIRECT, LEARNED, Row
from torch import Tensor, nn
from torch.nn import functional as F

import feedbackward as fb

Grads = dict[str, Tensor | None]


def step_of(learner: fb.Learner, batch: tuple[Tensor, Tensor]) -> Grads:
    """The gradients of one step alone, of the network and of the feedback."""
    learner.zero_grad()
    x, y = batch
    loss_fn(y)(learner(x)).backward()
    found = grads(learner)
    learner.zero_grad()
    return found


def assert_equal(got: Grads, expected: Grads, tolerance: float = 1e-13) -> None:
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        assert_close(gradient, expected[name], name, tolerance)


def total(first: Grads, second: Grads) -> Grads:
    return {name: None if g is None else g + second[name] for name, g in first.items()}


@pytest.mark.parametrize("row", DIRECT, ids=str)
@pytest.mark.parametrize("pair", [CONV, TOKENS], ids=str)
class TestOrders:
    def test_accumulation_adds_up(self, pair: Pair, row: Row) -> None:
        learner, one, two = pair.attach(row.rule), pair.batch(4, 1), pair.batch(3, 2)
        expected = total(step_of(learner, one), step_of(learner, two))
        for x, y in (one, two):
            loss_fn(y)(learner(x)).backward()
        assert_equal(grads(learner), expected)

    @pytest.mark.parametrize("order", ["one sum", "in order", "reversed"])
    def test_two_forwards_before_the_backward(self, pair: Pair, row: Row, order: str) -> None:
        learner, one, two = pair.attach(row.rule), pair.batch(4, 1), pair.batch(3, 2)
        expected = total(step_of(learner, one), step_of(learner, two))
        losses = [loss_fn(y)(learner(x)) for x, y in (one, two)]
        if order == "one sum":
            losses = [losses[0] + losses[1]]
        for loss in reversed(losses) if order == "reversed" else losses:
            loss.backward()
        assert_equal(grads(learner), expected)

    @pytest.mark.parametrize("between", ["no_grad", "eval", "exact", "model", "probe", "failed"])
    def test_another_forward_in_between(self, pair: Pair, row: Row, between: str) -> None:
        """A pass between forward and backward, of whatever kind, leaves the pending backward as it was."""
        learner, one, (x, y) = pair.attach(row.rule), pair.batch(4, 1), pair.batch(3, 2)
        expected = step_of(learner, one)
        loss = loss_fn(one[1])(learner(one[0]))
        if between == "no_grad":
            with torch.no_grad():
                learner(x)
        elif between == "eval":
            learner.eval()(x)
        elif between == "exact":
            with learner.exact():
                learner(x)
        elif between == "model":
            learner.model(x)
        elif between == "probe":
            fb.probe(learner, loss_fn(y), x)
        else:
            with pytest.raises((RuntimeError, fb.SiteError)):
                learner(x[..., :-1])
        loss.backward()
        assert_equal(grads(learner), expected)

    def test_signals_are_linear_in_the_error(self, pair: Pair, row: Row) -> None:
        """A loss scale, or loss / k under accumulation, scales every gradient alike; or the rule says that it does not."""
        if not row.rule.linear:
            pytest.skip("the rule says so, and refuses a loss scale")
        learner, (x, y) = pair.attach(row.rule), pair.batch()
        expected = {name: g * 3 for name, g in step_of(learner, (x, y)).items() if g is not None}
        (3 * loss_fn(y)(learner(x))).backward()
        assert_equal({name: g for name, g in grads(learner).items() if g is not None}, expected)

    def test_order_of_the_samples_is_immaterial(self, pair: Pair, row: Row) -> None:
        learner, (x, y) = pair.attach(row.rule), pair.batch()
        order = torch.tensor([2, 0, 3, 1])
        assert_equal(step_of(learner, (x[order], y[order])), step_of(learner, (x, y)))

    def test_a_deep_copy_is_a_learner_of_its_own(self, pair: Pair, row: Row) -> None:
        learner, batch = pair.attach(row.rule), pair.batch()
        expected = step_of(learner, batch)
        twin = copy.deepcopy(learner)
        with torch.no_grad():
            for p in learner.parameters():
                p.zero_()
        assert_equal(step_of(twin, batch), expected)


@pytest.mark.parametrize("row", [row for row in DIRECT if row.rule.linear], ids=str)
def test_halves_of_a_batch_are_the_whole(row: Row) -> None:
    """Without batch statistics the mean loss of a batch is the mean of its halves; centring is such a statistic."""
    learner, (x, y) = MLP.attach(row.rule), MLP.batch(6)
    whole = step_of(learner, (x, y))
    for half in (slice(0, 3), slice(3, 6)):
        (loss_fn(y[half])(learner(x[half])) / 2).backward()
    got = grads(learner)
    if row.rule.least_batch > 1:
        got, whole = (
            grads(learner.model),
            {k.removeprefix("model."): v for k, v in whole.items() if k[:5] == "model"},
        )
    assert_equal(got, whole)


@pytest.mark.parametrize("row", LEARNED, ids=str)
def test_feedback_learns_from_the_activity_at_the_site(row: Row) -> None:
    """Several steps by hand in NumPy, W and B both moving, against the optimizer's."""
    model = MLP.model()
    learner = MLP.attach(row.rule, model)
    net = MLP.mirror(model)
    B = {e.site.name: learner.feedback_of(e).detach().numpy().copy() for e in learner.graph.edges}
    optimizer = torch.optim.SGD(
        fb.param_groups(
            learner,
            model={"lr": 0.3, "weight_decay": 0.01},
            feedback={"lr": 0.1, "weight_decay": 0.02},
        )
    )
    for t in range(4):
        x, y = MLP.batch(seed=t)
        found = oracles.step(net, x.numpy(), y.numpy(), row, B)
        for layer in [*(layer for layers in net.segments.values() for layer in layers), *net.head]:
            for key, value in layer.parameters.items():
                value -= 0.3 * (found.parameters[f"{layer.name}.{key}"] + 0.01 * value)
        for name, value in B.items():
            value -= 0.1 * (found.feedback[name] + 0.02 * value)
        optimizer.zero_grad()
        loss_fn(y)(learner(x)).backward()
        optimizer.step()
    for e in learner.graph.edges:
        assert_close(learner.feedback_of(e).detach(), B[e.site.name], e.site.name)
    for layer in net.head:
        assert_close(model.head.weight.detach(), layer.parameters["weight"], "head")


class InPlace(nn.Module):
    """A functional in-place activation after `fc2`, so that a site at fc2's output would be changed under its feet."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(7, 5), nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc2(F.relu(self.fc1(x))), inplace=True)
        return self.head(x)


def test_in_place_change_after_a_cut_is_refused() -> None:
    with pytest.raises(fb.SiteError, match=r"'fc2' was changed in place"):
        fb.attach(InPlace().to(F64), fb.DKP.published(), example=MLP.batch()[0], sites=["fc2"])


def test_in_place_activation_after_the_source_is_plain_backprop_there() -> None:
    """error_at names a pre-activation, and what follows it works in place, as in many published nets."""
    torch.manual_seed(0)
    model = InPlace().to(F64)
    x, y = MLP.batch()
    truth = exact_grads(model, x, y)
    learner = fb.attach(model, fb.DKP.published(), example=x, error_at="fc2")
    signals(learner, x, y)
    for name in ("fc2.weight", "fc2.bias", "head.weight", "head.bias"):
        assert_close(model.get_parameter(name).grad, truth[name], name)
    with torch.no_grad():
        h = F.relu(model.fc1(x)).numpy()
    with learner.exact():
        model.zero_grad()
        a = model.fc2(torch.from_numpy(h))
        a.retain_grad()
        loss_fn(y)(model.head(F.relu(a))).backward()
    B = learner.feedback_of(learner.graph.edges[0])
    assert_close(
        B.grad,
        oracles.outer_product(oracles.Known(a.grad.numpy(), h, B.detach().numpy(), None)),
        "feedback",
    )


def test_in_place_activation_before_a_cut_is_the_site() -> None:
    """The site is the activity that enters the next layer: after the in-place ReLU, not before it."""
    torch.manual_seed(0)
    layers = [
        nn.Linear(7, 5),
        nn.ReLU(inplace=True),
        nn.Linear(5, 4),
        nn.ReLU(inplace=True),
        nn.Linear(4, 3),
    ]
    model = nn.Sequential(*layers).to(F64)
    twin = copy.deepcopy(model)
    for module in (twin[1], twin[3]):
        module.inplace = False
    batch = MLP.batch()
    learner, reference = (fb.attach(m, fb.DKP.published(), example=batch[0]) for m in (model, twin))
    assert [site.name for site in learner.sites] == ["1", "3"]
    assert_equal(step_of(learner, batch), step_of(reference, batch), tolerance=0.0)


def test_gradients_of_the_input_are_refused() -> None:
    learner, (x, _) = MLP.attach(fb.DFA()), MLP.batch()
    with pytest.raises(fb.AttachError, match=r"exact\(\)"):
        learner(x.requires_grad_())
    with learner.exact():
        learner(x).sum().backward()
    assert x.grad is not None


def test_another_input_size_is_refused_by_the_site() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.ReLU(),
        nn.Conv2d(3, 3, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, 3),
    )
    learner = fb.attach(model, fb.DFA(), example=torch.randn(2, 2, 8, 8))
    with pytest.raises(fb.SiteError, match=r"site '1'.*\[2, 3, 7, 7\].*\[3, 6, 6\]"):
        learner(torch.randn(2, 2, 9, 9))


def test_attach_plans_in_training_mode() -> None:
    """A model handed over in evaluation mode is planned as it will be trained, and handed back in evaluation mode."""

    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.act, self.extra, self.head = (
                nn.Linear(7, 5),
                nn.ReLU(),
                nn.Linear(5, 5),
                nn.Linear(5, 3),
            )

        def forward(self, x: Tensor) -> Tensor:
            h = self.act(self.fc1(x))
            return self.head(F.relu(self.extra(h)) if self.training else h)

    model = Auxiliary().to(F64).eval()
    learner = fb.attach(model, fb.DFA(), example=MLP.batch()[0])
    assert not model.training
    assert [segment.parameters for segment in learner.plan.segments] == [
        ("fc1.weight", "fc1.bias"),
        ("extra.weight", "extra.bias"),
    ]
