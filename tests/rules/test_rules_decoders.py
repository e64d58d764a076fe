"""How the decoders of target propagation learn: gradients against naive references, and where they lead."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import oracles
import pytest
import torch
from oracles import Array
from pairs import CONV, F64, MLP, Pair, assert_close, grads, loss_fn
from test_rules_targets import PHASED, decoded, decoders, linear_net, path, softmax
from torch import Tensor

import feedbackward as fb
from feedbackward.engine.phase import Phase

SLOPES: dict[str, Callable[[Array], Array]] = {
    "linear": np.ones_like,
    "tanh": lambda a: 1 - np.tanh(a) ** 2,
    "relu": lambda a: (a > 0).astype(float),
}


def descended(
    weights: list[Array], pairs: list[tuple[Array, Array, float]], activation: str
) -> tuple[Array, Array]:
    """Gradients by B and b of a loss whose derivatives by g(z) are known: (z, dLoss/dg(z), 1) for every z."""
    B, b = weights[:2]
    dB, db = np.zeros_like(B), np.zeros_like(b)
    for s, dg, sign in pairs:
        z = s.reshape(len(s), -1)
        a = np.einsum("mc,c...->m...", z, B) + b
        da = sign * dg * SLOPES[activation](a)
        dB += np.einsum("mc,m...->c...", z, da)
        db += da.sum(0)
    return dB, db


def recorded_noise(monkeypatch: pytest.MonkeyPatch) -> list[Array]:
    drawn: list[Array] = []
    original = Phase.noise

    def noise(self: Phase, like: Tensor) -> Tensor:
        drawn.append(original(self, like).numpy())
        return torch.tensor(drawn[-1])

    monkeypatch.setattr(Phase, "noise", noise)
    return drawn


@pytest.mark.parametrize("pair", [MLP, CONV], ids=str)
@pytest.mark.parametrize(
    "rule",
    [
        fb.rules.DTP(activation="tanh", sigma=0.2, kernel=0, normalized=False),
        fb.rules.SDTP(activation="relu", sigma=0.2, kernel=0, normalized=False),
    ],
    ids=lambda r: r.name,
)
def test_reconstruction_gradients(
    pair: Pair, rule: fb.rules.DTP, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of |g(f(h + eps)) - (h + eps)|^2 / (N sigma^2), each segment from a clean h."""
    drawn = recorded_noise(monkeypatch)
    model = pair.model()
    learner = pair.attach(rule, model)
    x, _ = pair.batch()
    learner.feedback_step(x)
    net, value = pair.mirror(model), x.numpy()
    clean = {}
    for name, layers in net.segments.items():
        clean[name] = value = oracles._forward(layers, value)
    # the last site of DTP has no decoder, and gets no noise
    noisy = {name: h + 0.2 * eps for (name, h), eps in zip(clean.items(), drawn, strict=False)}
    assert len(noisy) == len(learner.graph.edges)
    above = [*list(net.segments.values())[1:], net.head]
    for edge, layers in zip(learner.graph.edges, above, strict=False):
        h = noisy[edge.site.name]
        s = oracles._forward(layers, h)
        if rule.name == "sdtp" and layers is net.head:
            s = softmax(s)
        weights = decoders(learner)[edge.site.name]
        dg = 2 * (decoded(weights, s, rule.activation) - h) / (len(x) * 0.2**2)
        for got, expected in zip(
            learner.weights_of(edge), descended(weights, [(s, dg, 1)], rule.activation), strict=True
        ):
            assert_close(got.grad, expected, edge.site.name)


@pytest.mark.parametrize("pair", [MLP, CONV], ids=str)
def test_difference_reconstruction_gradients(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = recorded_noise(monkeypatch)
    model, sigma, damping = pair.model(), 0.3, 0.7
    learner = pair.attach(fb.rules.DDTP(activation="tanh", sigma=sigma, damping=damping), model)
    x, _ = pair.batch()
    learner.feedback_step(x)
    net, n = pair.mirror(model), len(x)
    names = list(net.segments)

    def run(value: Array, start: int) -> Array:
        for name in names[start:]:
            value = oracles._forward(net.segments[name], value)
        return oracles._forward(net.head, value)

    out, value = run(x.numpy(), 0), x.numpy()
    for i, edge in enumerate(learner.graph.edges):
        value = oracles._forward(net.segments[names[i]], value)
        eps, far_off = sigma * drawn[2 * i], sigma * drawn[2 * i + 1]
        far, near, weights = run(value + eps, i + 1), out + far_off, decoders(learner)[names[i]]
        g = {
            key: decoded(weights, s, "tanh")
            for key, s in (("far", far), ("here", out), ("near", near))
        }
        first = 2 * (g["far"] - g["here"] - eps) / (n * sigma**2)
        second = 2 * damping * (g["near"] - g["here"]) / (n * sigma**2)
        terms = [(far, first, 1.0), (out, first, -1.0), (near, second, 1.0), (out, second, -1.0)]
        expected = descended(weights, terms, "tanh")
        for got, gradient in zip(learner.weights_of(edge), expected, strict=True):
            assert_close(got.grad, gradient, names[i])


def learn_decoders(learner: fb.Learner, x: Tensor, steps: int = 600) -> None:
    optimizer = torch.optim.Adam(learner.feedback.parameters(), lr=0.03)
    for t in range(steps):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - t / steps)
        optimizer.zero_grad()
        learner.feedback_step(x)
        optimizer.step()


@pytest.mark.nightly
def test_the_phase_drives_decoders_to_the_inverse_of_the_layer() -> None:
    model = linear_net(5, 5, 5, 5)
    x = torch.randn(64, 5, dtype=F64)
    learner = fb.attach(model, fb.rules.DTP(), example=x)
    learn_decoders(learner, x)
    for edge in learner.graph.edges:
        layer = model[int(edge.source.name)]
        inverse = torch.linalg.inv(layer.weight.detach())
        B, bias = (w.detach() for w in learner.weights_of(edge))
        assert (B.t() - inverse).norm() < 0.01 * inverse.norm()
        assert (bias + inverse @ layer.bias.detach()).norm() < 0.01


@pytest.mark.nightly
@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_the_phase_drives_direct_decoders_to_the_pseudo_inverse(damping: float) -> None:
    """J^T (J J^T + damping)^-1 of the whole path, also where a layer loses dimensions."""
    model = linear_net(6, 5, 4, 3)
    x = torch.randn(256, 6, dtype=F64)
    learner = fb.attach(model, fb.rules.DDTP(damping=damping), example=x)
    learn_decoders(learner, x)
    for edge in learner.graph.edges:
        J = path(model, edge.site.name)
        expected = J.t() @ torch.linalg.inv(J @ J.t() + damping * torch.eye(3, dtype=F64))
        assert (learner.feedback_of(edge).detach().t() - expected).norm() < 0.04 * expected.norm()


@pytest.mark.parametrize("rule", PHASED, ids=lambda r: r.name)
def test_decoders_learn_in_their_phase_only(rule: fb.Rule) -> None:
    """A backward pass leaves their gradients None; the phase touches nothing else; random layers never learn."""
    model = CONV.model()
    x, y = CONV.batch()
    learner = CONV.attach(rule, model)
    learner.target(y)
    loss_fn(y)(learner(x)).backward()
    assert all(p.grad is None for p in learner.feedback.parameters())
    before, state = grads(model), copy.deepcopy(model.state_dict())
    learner.feedback_step(x)
    assert all(p.grad is not None for p in learner.feedback.parameters())
    assert all(learner.feedback_of(edge).grad.any() for edge in learner.graph.edges)
    for name, gradient in grads(model).items():
        assert_close(gradient, before[name], name, tolerance=0.0)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    random = [name for name, _ in learner.feedback.named_buffers()]
    assert len(random) == (3 if rule.name == "ddtp" else 0)


def test_the_phase_in_bf16_sees_the_noise() -> None:
    """sigma is lost in a bf16 activity: the phase runs in full precision under autocast."""
    x = torch.randn(8, 7)
    rule = fb.rules.DDTP(sigma=1e-3)
    got = []
    for enabled in (False, True):
        torch.manual_seed(0)
        learner = fb.attach(MLP.model().float(), rule, example=x)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            learner.feedback_step(x)
        got.append(learner.feedback.get_parameter("act1").grad)
    assert_close(got[1], got[0], tolerance=1e-6)
