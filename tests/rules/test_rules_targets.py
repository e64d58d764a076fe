"""Target propagation and local representation alignment against naive references, and what their theory says of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import oracles
import pytest
import torch
from oracles import Array
from pairs import (
    CONV,
    F64,
    MLP,
    TOKENS,
    VIT,
    Pair,
    assert_close,
    grads,
    loss_fn,
    signals,
)
from torch import Tensor, nn

import feedbackward as fb
from feedbackward.operators.decoder import Decoder

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "linear": lambda a: a,
    "tanh": np.tanh,
    "relu": lambda a: np.maximum(a, 0),
}


def softmax(a: Array) -> Array:
    p = np.exp(a - a.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def decoded(weights: list[Array], s: Array, activation: str) -> Array:
    """g(s)_mj = f(sum_c z_mc B_cj + b_j), z the source, or tanh(s R) of it where there is a random layer."""
    B, b, *R = weights
    z = s.reshape(len(s), -1)
    if R:
        z = np.tanh(np.einsum("mc,ck->mk", z, R[0]))
    return ACTIVATIONS[activation](np.einsum("mc,c...->m...", z, B) + b)


def decoders(learner: fb.Learner) -> dict[str, list[Array]]:
    return {
        e.site.name: [w.detach().numpy().copy() for w in learner.weights_of(e)]
        for e in learner.graph.edges
    }


def targets_step(
    net: oracles.Net,
    x: Array,
    labels: Array,
    weights: dict[str, list[Array]],
    rule: fb.Rule,
    beta: float,
) -> oracles.Step:
    """One step by targets: from site to site, or from the output to each (`DDTP`), or from the one-hot target (`SDTP`)."""
    activities: dict[str, Array] = {}
    for name, layers in net.segments.items():
        activities[name] = x = oracles._forward(layers, x)
    out = oracles._forward(net.head, x)
    loss, error = oracles.cross_entropy(out, labels)
    parameters: dict[str, Array | None] = {}
    into = oracles._backward(net.head, error, parameters)
    n, names = len(x), list(reversed(net.segments))
    s, t = out, out - beta * n * error
    if getattr(rule, "top", "") == "gradient":  # the last site is not cut
        last = names.pop(0)
        oracles._backward(net.segments[last], into, parameters)
        s, t = activities[last], activities[last] - beta * n * into
    if rule.name == "sdtp":
        s, t = softmax(out), np.eye(out.shape[1])[labels]
    sent: dict[str, Array | None] = {}
    for name in names:
        h = activities[name]
        change = decoded(weights[name], s, rule.activation) - decoded(
            weights[name], t, rule.activation
        )  # type: ignore[attr-defined]
        target = h - change
        sent[name] = (h - target) / (beta * n)
        oracles._backward(net.segments[name], sent[name], parameters)
        if rule.name != "ddtp":
            s, t = h, target
    return oracles.Step(loss, error, sent, parameters, {})


TARGETS = [
    (fb.rules.DTP(beta=0.3, kernel=0), 0.3),
    (fb.rules.DTP(beta=0.3, activation="tanh", kernel=0), 0.3),
    (fb.rules.DTP(beta=2.0, activation="relu", kernel=0), 2.0),
    (fb.rules.DTP(beta=0.3, activation="tanh", top="decoder", kernel=0), 0.3),
    (fb.rules.DTP(beta=0.3, kernel=0, decoders="fixed"), 0.3),
    (fb.rules.DTP(beta=0.3, activation="tanh", top="decoder", kernel=0, decoders="fixed"), 0.3),
    (fb.rules.DDTP(beta=0.3, activation="tanh"), 0.3),
    (fb.rules.DDTP(beta=0.3, hidden=5), 0.3),
    (fb.rules.SDTP(activation="tanh", kernel=0), 1.0),
]


@pytest.mark.parametrize(("rule", "beta"), TARGETS, ids=str)
@pytest.mark.parametrize("pair", [MLP, CONV], ids=str)
def test_targets_equal_the_oracle(pair: Pair, rule: fb.Rule, beta: float) -> None:
    model = pair.model()
    x, y = pair.batch()
    learner = pair.attach(rule, model)
    for w in learner.feedback.state_dict().values():  # biases matter
        nn.init.normal_(w, std=0.3)
    expected = targets_step(pair.mirror(model), x.numpy(), y.numpy(), decoders(learner), rule, beta)
    learner.target(y)
    got = signals(learner, x, y)
    for name, signal in expected.signals.items():
        assert_close(got[name], signal, f"signal at {name}")
    for name, gradient in grads(model).items():
        assert_close(gradient, expected.parameters[name], name)


PHASED = [fb.rules.DTP(), fb.rules.DDTP(hidden=4), fb.rules.SDTP()]


def linear_net(*sizes: int) -> nn.Sequential:
    """Affine layers of well-conditioned weights."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))).to(F64)
    for layer in model:
        nn.init.orthogonal_(layer.weight)
        with torch.no_grad():
            layer.weight.add_(0.1 * torch.randn_like(layer.weight))
    return model


def path(model: nn.Sequential, site: str) -> Tensor:
    """The Jacobian of the output by the activity of this site."""
    J = torch.eye(model[-1].out_features, dtype=F64)
    for layer in reversed(list(model)[int(site) + 1 :]):
        J = J @ layer.weight.detach()
    return J


@pytest.mark.parametrize(
    "rule", [fb.rules.DTP(beta=0.7, top="decoder"), fb.rules.DDTP(beta=0.7)], ids=lambda r: r.name
)
def test_exact_inverses_give_the_targets_of_gauss_newton(
    rule: fb.rules.DTP | fb.rules.DDTP,
) -> None:
    """The least change of h_l that moves the output by -beta N e, sample by sample."""
    model = linear_net(5, 5, 5, 5)
    x, y = torch.randn(6, 5, dtype=F64), torch.randint(5, (6,))
    learner = fb.attach(model, rule, example=x)
    for edge in learner.graph.edges:
        J = (
            path(model, edge.site.name)
            if rule.name == "ddtp"
            else model[int(edge.source.name)].weight.detach()
        )
        with torch.no_grad():
            learner.feedback_of(edge).copy_(torch.linalg.inv(J).t())
    got = signals(learner, x, y)
    _, e = oracles.cross_entropy(model(x).detach().numpy(), y.numpy())
    for edge in learner.graph.edges:
        J, name = path(model, edge.site.name), edge.site.name
        step = torch.linalg.lstsq(
            J, -rule.beta * len(x) * torch.tensor(e).t()
        ).solution.t()  # the target minus h
        assert_close(-rule.beta * len(x) * got[name], step, name)


@pytest.mark.parametrize("rule", [fb.rules.DTP, fb.rules.DDTP])
def test_near_targets_send_the_derivative_of_the_decoder(rule: type[fb.rules.DTP]) -> None:
    """With beta to zero the signal is d dg/ds."""
    x, y = MLP.batch()
    learner = MLP.attach(rule(beta=1e-6, activation="tanh"))
    met: dict[str, Tensor] = {}
    handles = [
        learner.model.get_submodule(name).register_forward_hook(
            lambda m, a, out, name=name: met.update({name: out})
        )
        for name in [*MLP.cuts, "head"]
    ]
    got = signals(learner, x, y)
    for handle in handles:
        handle.remove()
    _, e = oracles.cross_entropy(met["head"].detach().numpy(), y.numpy())
    for edge in learner.graph.edges:
        s = met[edge.source.name].detach().requires_grad_()
        d = torch.tensor(e) if edge.source.name == "head" else got[edge.source.name]
        jacobian = torch.autograd.functional.jacobian(
            lambda s, edge=edge: edge.operator.decode(
                learner.weights_of(edge), s, edge.site_shape
            ).sum(0),
            s,
        )
        expected = torch.einsum("jmc,mc->mj", jacobian, d)
        assert_close(got[edge.site.name], expected.detach(), edge.site.name, tolerance=1e-5)


# --- the one-hot target ------------------------------------------------------------------------------------------


def test_sdtp_with_a_cross_entropy_sends_the_error_through_its_topmost_decoder() -> None:
    """N e = p - y: no gradient is needed to know it, and none is used."""
    x, y = MLP.batch()
    learner = MLP.attach(fb.rules.SDTP())
    learner.target(y)
    got = signals(learner, x, y)
    _, e = oracles.cross_entropy(learner.model(x).detach().numpy(), y.numpy())
    B = learner.feedback_of(learner.graph.edges[-1]).detach()
    assert_close(got["act3"], torch.tensor(e) @ B)
    learner.target(y)
    other = signals(learner, x, y, loss=lambda out: out.pow(2).sum())
    for name, signal in got.items():
        assert_close(other[name], signal, name, tolerance=0.0)


def test_sdtp_by_the_scale_goes_part_of_the_way_and_ignores_unknown_labels() -> None:
    x, y = MLP.batch()
    learner = MLP.attach(fb.rules.SDTP())
    learner.target(y)
    full = signals(learner, x, y)
    learner.target(y, scale=0.25)
    part = signals(learner, x, y)
    assert_close(part["act3"], 0.25 * full["act3"])
    y = y.clone()
    y[0] = -100
    learner.target(y)
    assert not signals(learner, x, y)["act3"][0].any()


def test_sdtp_needs_targets_and_classes() -> None:
    x, _ = MLP.batch()
    with pytest.raises(fb.FeedbackError, match=r"learner\.target"):
        MLP.attach(fb.rules.SDTP())(x)
    with pytest.raises(fb.AttachError, match="use DTP"):
        CONV.attach(fb.rules.SDTP(), error_at="conv2", sites=["act1"])


# --- what cannot be done -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", PHASED, ids=lambda r: r.name)
def test_signals_that_do_not_scale_with_the_loss_refuse_fp16(rule: fb.Rule) -> None:
    x, y = MLP.batch()
    learner = MLP.attach(rule)
    learner.target(y)
    with torch.autocast("cpu", torch.float16), pytest.raises(fb.FeedbackError, match="GradScaler"):
        learner(x)


@pytest.mark.parametrize("rule", PHASED, ids=lambda r: r.name)
@pytest.mark.parametrize("schedule", ["replay", "eager"])
def test_schedules_that_do_not_keep_the_source_are_refused(rule: fb.Rule, schedule: str) -> None:
    x, y = MLP.batch()
    learner = MLP.attach(rule)
    learner.target(y)
    with pytest.raises(
        fb.AttachError, match="joint" if schedule == "replay" else "after the forward pass"
    ):
        learner.backward(x, loss_fn(y), schedule=schedule)  # type: ignore[arg-type]


def test_decoders_that_no_machine_holds_are_refused() -> None:
    with pytest.raises(fb.AttachError, match=r"65536 to 32768 units would hold 8\.6 GB.*DDTP"):
        Decoder().fit((64, 32, 32), (32, 32, 32), 0)
    assert Decoder().fit((10,), (64, 32, 32), 0) == Decoder()


def test_targets_between_sites_with_and_without_tokens_are_refused() -> None:
    with pytest.raises(fb.AttachError, match=r"token dimensions .*'norm1' and 'act1'.*DDTP"):
        VIT.attach(fb.rules.DTP(top="decoder"), sites=["norm1", "act1"])
    x, y = TOKENS.batch()
    learner = TOKENS.attach(fb.rules.DTP(beta=0.5))
    assert all(signal.any() for signal in signals(learner, x, y).values())
    for pair, rule, sites in (
        (VIT, fb.rules.DTP(), "layers"),
        (VIT, fb.rules.DDTP(), ["norm1", "act1"]),
    ):
        x, y = pair.batch()
        assert all(
            signal.any() for signal in signals(pair.attach(rule, sites=sites), x, y).values()
        )


def test_wrong_options_are_refused() -> None:
    for make in (
        lambda: fb.rules.DTP(sigma=0.0),
        lambda: MLP.attach(fb.rules.DTP(beta=0.0)),
        lambda: MLP.attach(fb.rules.DTP(top="loss")),
        lambda: fb.rules.DTP(decoders="frozen"),
        lambda: MLP.attach(fb.rules.DTP(), sites=["act2"]),
        lambda: MLP.attach(fb.rules.DTP(activation="sine")),
        lambda: fb.rules.DDTP(damping=-1.0),
        lambda: fb.rules.DDTP(hidden=-1),
    ):
        with pytest.raises(fb.AttachError):
            make()


@pytest.mark.parametrize("pair", [MLP, CONV], ids=str)
def test_fixed_decoders_send_errors_through_random_matrices(pair: Pair) -> None:
    """Linear ones, whatever beta is: delta h_l = delta h_{l+1} B_l from the output's error e, without activations' derivatives."""
    learner = pair.attach(fb.rules.DTP(top="decoder", decoders="fixed", beta=3.0, kernel=0))
    x, y = pair.batch()
    found = signals(learner, x, y)
    p = learner(x).softmax(1)
    carried = ((p - nn.functional.one_hot(y, pair.classes)) / len(x)).detach()
    for edge in reversed(learner.graph.edges):
        carried = carried.flatten(1) @ learner.weights_of(edge)[0].flatten(1)
        assert_close(found[edge.site.name].flatten(1), carried, edge.site.name, 1e-10)


@pytest.mark.parametrize("top", ["gradient", "decoder"])
def test_fixed_decoders_are_no_parameters_and_have_no_phase(top: str) -> None:
    rule = fb.rules.DTP(top=top, decoders="fixed")
    learner, (x, y) = CONV.attach(rule), CONV.batch()
    assert not rule.learned
    assert not rule.in_phase
    assert not list(learner.feedback.parameters())
    drawn = {
        k: w.clone() for k, w in CONV.attach(fb.rules.DTP(top=top)).feedback.state_dict().items()
    }
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss_fn(y)(learner(x)).backward()
        assert all(
            p.grad.any() for n, p in learner.model.named_parameters() if n.endswith("weight")
        )
        optimizer.step()
    kept = learner.feedback.state_dict()
    assert drawn.keys() == kept.keys()
    assert all(torch.equal(drawn[k], kept[k]) for k in drawn)
    with pytest.raises(fb.FeedbackError, match="DTP has no phase of its own"):
        learner.feedback_step(x)


# --- all of them -------------------------------------------------------------------------------------------------


def accuracy(rule: fb.Rule) -> float:
    """On a task that frozen random features do not solve."""
    torch.manual_seed(0)
    x = torch.randn(400, 6, dtype=F64)
    y = (x[:, 0] * x[:, 1] > 0).long()
    model = nn.Sequential(
        nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2)
    ).to(F64)
    learner = fb.attach(model, rule, example=x)
    optimizer = torch.optim.Adam(
        fb.param_groups(learner, model={"lr": 0.02}, feedback={"lr": 0.005})
    )
    for _ in range(150):
        optimizer.zero_grad()
        learner.target(y)
        loss_fn(y)(learner(x)).backward()
        if rule.in_phase:
            learner.feedback_step(x)
        optimizer.step()
    return (model(x).argmax(1) == y).double().mean().item()


@pytest.mark.single
@pytest.mark.parametrize(
    "rule",
    [
        fb.rules.DTP(activation="tanh"),
        fb.rules.DTP(activation="tanh", top="decoder", decoders="fixed"),
        fb.rules.DDTP(),
        fb.rules.SDTP(),
    ],
    ids=["dtp", "fw-dtp", "ddtp", "sdtp"],
)
def test_hidden_layers_learn(rule: fb.Rule) -> None:
    assert accuracy(rule) > accuracy(fb.Frozen()) + 0.1
