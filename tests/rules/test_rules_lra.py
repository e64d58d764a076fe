"""Local representation alignment against the published recursion, and what it cannot see through."""

from __future__ import annotations

import copy
from collections import OrderedDict

import oracles
import pytest
import torch
from oracles import Array
from pairs import CONV, F64, MLP, Pair, assert_close, exact_grads, grads, loss_fn, mirrored
from test_rules_targets import ACTIVATIONS, accuracy
from torch import Tensor, nn

import feedbackward as fb

# --- local representation alignment ------------------------------------------------------------------------------

CHAIN = Pair(
    "lra-conv",
    lambda: nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(2, 4, 3, padding=1), act1=nn.ReLU(), conv2=nn.Conv2d(4, 4, 3, stride=2, groups=2), act2=nn.Tanh(),
            flat=nn.Flatten(), fc1=nn.Linear(36, 5), head=nn.Linear(5, 3),
        )
    ),
    (2, 8, 8), (), 3, ("act1",),
)  # fmt: skip


def lra_step(
    model: nn.Sequential, x: Array, labels: Array, E: dict[str, Array], beta: float
) -> dict[str, Array]:
    """The published recursion, on un-normalised errors: e_L = p - y; d = beta e E; t = f(a - d); e = f(a) - t; gW = e^T h / N."""
    layers = [mirrored(name, module) for name, module in model.named_children()]
    value, made = x, []
    for layer in layers:
        value = layer.forward(value)
        made.append(value)
    n = len(x)
    e = oracles.cross_entropy(value, labels)[1] * n
    found: dict[str, Array] = {}
    at = len(layers) - 1
    while True:
        layer = layers[at]
        layer.backward(e / n)  # e^T h / N, and the sum of e / N for the bias
        found |= {f"{layer.name}.{key}": gradient for key, gradient in layer.grads.items()}
        below = [i for i in range(at) if layers[i].parameters]
        if not below:
            return found
        between, a = layers[below[-1] + 1 : at], made[below[-1]]
        layer.parameters = {**layer.parameters, "weight": E[layer.name]}
        d = beta * layer.backward(e).reshape(a.shape)
        f = [
            ACTIVATIONS[type(b).__name__.lower()]
            for b in between
            if not isinstance(b, oracles.Flatten)
        ]
        change = f[0] if f else ACTIVATIONS["linear"]
        e = change(a) - change(a - d)
        at = below[-1]


@pytest.mark.parametrize("pair", [MLP, CHAIN], ids=str)
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_lra_equals_the_published_recursion(pair: Pair, beta: float) -> None:
    model = pair.model()
    x, y = pair.batch()
    learner = pair.attach(fb.rules.LRA(beta=beta), model)
    E = {e.source.name: learner.feedback_of(e).detach().numpy().copy() for e in learner.graph.edges}
    expected = lra_step(model, x.numpy(), y.numpy(), E, beta)
    loss_fn(y)(learner(x)).backward()
    for name, gradient in grads(model).items():
        assert_close(gradient, expected[name], name)
    for edge in learner.graph.edges:  # the feedback gets the weight's own gradient
        assert torch.equal(learner.feedback_of(edge).grad, model.get_parameter(edge.shares).grad)


def test_lra_with_near_targets_and_true_weights_is_backprop() -> None:
    """f(a) - f(a - d) tends to f'(a) d; beta is a factor for every layer that an error has passed."""
    model, beta = MLP.model(), 1e-4
    x, y = MLP.batch()
    truth = exact_grads(model, x, y)
    learner = MLP.attach(fb.rules.LRA(beta=beta), model)
    for edge in learner.graph.edges:
        with torch.no_grad():
            learner.feedback_of(edge).copy_(model.get_parameter(edge.shares))
    loss_fn(y)(learner(x)).backward()
    for depth, layer in enumerate(("head", "fc3", "fc2", "fc1")):
        for key in ("weight", "bias"):
            name = f"{layer}.{key}"
            assert_close(grads(model)[name] / beta**depth, truth[name], name, tolerance=1e-3)


def test_lra_may_start_its_synapses_as_published() -> None:
    model = nn.Sequential(
        nn.Linear(4, 300), nn.Tanh(), nn.Linear(300, 200), nn.Tanh(), nn.Linear(200, 3)
    )
    learner = fb.attach(model, fb.rules.LRA(init="normal"), example=torch.randn(2, 4))
    E = learner.feedback_of(learner.graph.edges[0])
    assert E.shape == (200, 300)
    assert E.std().item() == pytest.approx(1.0, abs=0.02)
    assert E.abs().max() > 3.5  # normal, not uniform


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.head = nn.Linear(7, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.fc1(x)))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act = nn.Linear(7, 5), nn.Tanh()
        self.left, self.right = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.fc1(x))
        return self.left(h) + self.right(h)


def test_what_lra_cannot_see_through_is_refused_by_name() -> None:
    with pytest.raises(
        fb.AttachError, match=r"before layer 'conv2' stands 'pool1' \(MaxPool2d\).*KP"
    ):
        CONV.attach(fb.rules.LRA())
    with pytest.raises(fb.AttachError, match="'head' stands an operation that is no module"):
        fb.attach(Functional(), fb.rules.LRA(), example=torch.randn(2, 7))
    twice = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.ReLU(), nn.Linear(5, 3))
    with pytest.raises(fb.AttachError, match=r"'3' stands '1' \(Tanh\)"):
        fb.attach(twice, fb.rules.LRA(), example=torch.randn(2, 7))
    with pytest.raises(fb.AttachError, match="output of 'fc1' enters both 'left' and 'right'"):
        fb.attach(Branches(), fb.rules.LRA(), example=torch.randn(2, 7))


# --- rec-LRA -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["linear", "relu", "tanh"])
def test_rec_lra_moves_pre_activations_and_learns_by_the_outer_product(activation: str) -> None:
    """At the last activation of a block: f(a) - f(a - d) reaches a, where f is differentiable and not flat."""
    act = {"linear": nn.Identity(), "relu": nn.ReLU(), "tanh": nn.Tanh()}[activation]
    torch.manual_seed(0)
    model = nn.Sequential(
        OrderedDict(
            fc1=nn.Linear(7, 6),
            act1=act,
            fc2=nn.Linear(6, 5),
            act2=copy.copy(act),
            head=nn.Linear(5, 3),
        )
    ).to(F64)
    x, y = MLP.batch(8)
    beta = 1.5
    learner = fb.attach(model, fb.rules.RecLRA(beta=beta, activation=activation), example=x)
    loss_fn(y)(learner(x)).backward()
    value = x.numpy()
    f = ACTIVATIONS[activation]
    _, e = oracles.cross_entropy(model(x).detach().numpy(), y.numpy())
    e = e * len(x)
    for edge, layer in zip(learner.graph.edges, (model.fc1, model.fc2), strict=True):
        inputs = value
        a = inputs @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        value = f(a)
        E = learner.feedback_of(edge)
        d = beta * e @ E.detach().numpy()
        change = f(a) - f(a - d)
        if activation == "relu":
            change = change * (a > 0)  # a unit that is off is not seen
        assert_close(layer.weight.grad, change.T @ inputs / len(x), edge.site.name)
        assert_close(E.grad, e.T @ value / len(x), edge.site.name)


def test_rec_lra_without_an_activation_is_dkp() -> None:
    x, y = CONV.batch()
    found = []
    for rule in (fb.DKP.published(), fb.rules.RecLRA(activation="linear")):
        learner = CONV.attach(rule)
        loss_fn(y)(learner(x)).backward()
        found.append(grads(learner))
    for name, gradient in found[0].items():
        assert_close(found[1][name], gradient, name)


@pytest.mark.parametrize(
    "rule",
    [fb.rules.LRA(beta=0.1, init="normal"), fb.rules.RecLRA(activation="tanh")],
    ids=lambda r: r.name,
)
def test_hidden_layers_learn(rule: fb.Rule) -> None:
    assert accuracy(rule) > accuracy(fb.Frozen()) + 0.1


@pytest.mark.parametrize("rule", [fb.rules.LRA(), fb.rules.RecLRA()], ids=lambda r: r.name)
def test_signals_that_do_not_scale_with_the_loss_refuse_fp16(rule: fb.Rule) -> None:
    x, _ = MLP.batch()
    learner = MLP.attach(rule)
    with torch.autocast("cpu", torch.float16), pytest.raises(fb.FeedbackError, match="GradScaler"):
        learner(x)


def test_wrong_options_are_refused() -> None:
    for make in (
        lambda: fb.rules.LRA(beta=0.0),
        lambda: fb.rules.RecLRA(beta=-1.0),
        lambda: fb.rules.RecLRA(activation="sine"),
    ):
        with pytest.raises(fb.AttachError):
            make()
