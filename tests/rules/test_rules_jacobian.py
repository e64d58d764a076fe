"""Feedback that nears the Jacobian in a phase of its own (FDFA, GrAPE): what it estimates, and what a phase leaves alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from pairs import CONV, F64, MLP, TOKENS, VIT, Pair, assert_close, grads, loss_fn, signals, step
from torch import Tensor, nn
from wired import Net

import feedbackward as fb
from feedbackward.engine.phase import Phase


def linear_net() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(4, 3)).to(F64)
    return model, torch.randn(50, 5, dtype=F64)


def path_products(model: nn.Sequential, learner: fb.Learner) -> list[Tensor]:
    """W_L ... W_{l+1} for every site."""
    products, path = [], torch.eye(3, dtype=F64)
    for edge in reversed(learner.graph.edges):
        path = path @ model[int(edge.site.name) + 1].weight.detach()
        products.insert(0, path)
    return products


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The noise of all phases, in the order in which it is drawn."""
    drawn: list[Tensor] = []
    draw = Phase.noise

    def keep(phase: Phase, like: Tensor) -> Tensor:
        drawn.append(draw(phase, like))
        return drawn[-1]

    monkeypatch.setattr(Phase, "noise", keep)
    return drawn


def expected_moves(learner: fb.Learner, x: Tensor, noise: list[Tensor]) -> Tensor:
    """sum_l da/dh_l u_l by reverse mode: one backward pass for every unit of the output."""
    hs: list[Tensor] = []

    def keep(module: nn.Module, args: object, h: Tensor) -> None:
        hs.append(h)

    with learner.exact():
        handles = [
            learner.model.get_submodule(site.name).register_forward_hook(keep)
            for site in learner.sites
        ]
        output = learner(x)
    for handle in handles:
        handle.remove()
    moves = torch.zeros_like(output)
    for index in np.ndindex(*output.shape):
        parts = torch.autograd.grad(output[index], hs, retain_graph=True)
        moves[index] = sum((g * u).sum() for g, u in zip(parts, noise, strict=True))
    return moves


def estimates(learner: fb.Learner, x: Tensor, noise: list[Tensor]) -> list[Tensor]:
    """(1/M) d^T u for every edge, sample by sample, or token by token."""
    moves = expected_moves(learner, x, noise)
    found = []
    for edge, u in zip(learner.graph.edges, noise, strict=True):
        d, u = moves.flatten(0, edge.leading - 1), u.flatten(0, edge.leading - 1)
        found.append(
            sum(torch.tensordot(d[m].flatten(), u[m], dims=0) for m in range(len(d))) / len(d)  # type: ignore[arg-type]
        )
    return found


# --- FDFA ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", [MLP, CONV, TOKENS, VIT], ids=str)
def test_fdfa_estimates_the_jacobian_along_its_noise(pair: Pair, noise: list[Tensor]) -> None:
    """grad B = B - (1/M) d^T u, with d by reverse mode, whatever norm or pool lies above the sites."""
    learner = pair.attach(fb.rules.FDFA.published(operator=fb.Dense()))
    x, _ = pair.batch(3)
    learner.feedback_step(x)
    assert len(noise) == len(learner.sites)
    for edge, J in zip(learner.graph.edges, estimates(learner, x, noise), strict=True):
        B = learner.feedback_of(edge)
        assert_close(B.grad, B.detach() - J.detach(), edge.site.name)


def test_fdfa_by_default_sends_orthogonal_signals_and_follows_slowly(noise: list[Tensor]) -> None:
    """strength e U V^T of the singular vectors of B, and a tenth of the gradient."""
    rule = fb.rules.FDFA(operator=fb.Dense(), rate=0.1, strength=0.3)
    learner = MLP.attach(rule)
    x, y = MLP.batch(3)
    B = {edge.site.name: learner.feedback_of(edge).detach() for edge in learner.graph.edges}
    with learner.exact():
        logits = learner(x)
    e = torch.autograd.grad(loss_fn(y)(logits), logits)[0]
    for name, signal in signals(learner, x, y).items():
        U, _, V = torch.linalg.svd(B[name], full_matrices=False)
        assert_close(signal, 0.3 * e @ U @ V, name, tolerance=1e-3)
    learner.zero_grad()
    learner.feedback_step(x)
    for edge, J in zip(learner.graph.edges, estimates(learner, x, noise), strict=True):
        expected = 0.1 * (B[edge.site.name] - J.detach())
        assert_close(learner.feedback_of(edge).grad, expected, edge.site.name)


def test_fdfa_is_the_product_of_the_weights_on_a_linear_net() -> None:
    """E[J_hat] = W_L ... W_{l+1}. The entry (c, j) has the variance (sum_ki J_k[c, i]^2 + J_l[c, j]^2) / samples."""
    model, x = linear_net()
    learner = fb.attach(model, fb.rules.FDFA.published(), example=x)
    phases = 400
    for _ in range(phases):
        learner.feedback_step(x)
    truth = path_products(model, learner)
    rows = sum(J.square().sum(1, keepdim=True) for J in truth)
    for edge, J in zip(learner.graph.edges, truth, strict=True):
        mean = -learner.feedback_of(edge).grad / phases  # B is zero
        deviation = ((rows + J.square()) / (phases * len(x))).sqrt()
        assert ((mean - J).abs() < 5 * deviation).all()
        assert ((mean - J) / deviation).square().mean() == pytest.approx(
            1, abs=0.6
        )  # not smaller either


def test_fdfa_feedback_is_a_moving_average() -> None:
    """B after SGD steps of rate alpha: sum_t alpha (1 - alpha)^(T - t) J_hat_t."""
    model, x = linear_net()
    learner = fb.attach(model, fb.rules.FDFA.published(), example=x)
    edge = learner.graph.edges[0]
    B = learner.feedback_of(edge)
    optimizer = torch.optim.SGD(learner.feedback.parameters(), lr=0.1)
    average = torch.zeros_like(B)
    for _ in range(5):
        optimizer.zero_grad()
        learner.feedback_step(x)
        J = B.detach() - B.grad
        average = 0.9 * average + 0.1 * J
        optimizer.step()
    assert_close(B.detach(), average)


@pytest.mark.parametrize(
    "rule",
    [fb.rules.FDFA.published(), fb.rules.EBD(operator=fb.Dense("zeros"))],
    ids=["fdfa", "ebd"],
)
def test_feedback_that_starts_at_zero_trains_hidden_layers_from_the_second_step(
    rule: fb.Rule,
) -> None:
    learner = MLP.attach(rule)
    x, y = MLP.batch()
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    for first in (True, False):
        optimizer.zero_grad()
        step(learner, x, y)
        hidden = [learner.model.get_parameter(f"fc{i}.weight").grad for i in (1, 2, 3)]
        assert all(bool(gradient.any()) is not first for gradient in hidden)
        optimizer.step()


def test_every_phase_has_noise_of_its_own() -> None:
    """A pass restores torch's generators; the noise must not come from them. The seed still decides all of it."""
    model, x = linear_net()
    learner = fb.attach(model, fb.rules.FDFA(), example=x)

    def phase() -> Tensor:
        learner.zero_grad()
        learner.feedback_step(x)
        return learner.feedback_of(learner.graph.edges[0]).grad

    torch.manual_seed(3)
    first, second = phase(), phase()
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(phase(), first)


@pytest.mark.parametrize("rule", [fb.rules.FDFA(), fb.rules.GrAPE()], ids=["fdfa", "grape"])
def test_a_phase_changes_the_feedback_gradient_only(rule: fb.Rule) -> None:
    learner = CONV.attach(rule)
    x, _ = CONV.batch()
    before = {k: v.clone() for k, v in learner.model.state_dict().items()}
    for mode in (True, False):
        learner.train(mode)
        learner.zero_grad()
        learner.feedback_step(x)
        assert all(m.training is mode for m in learner.model.modules())
        assert all(p.grad is None for p in learner.model.parameters())
        assert all(B.grad.any() for B in learner.feedback.parameters())
    assert all(torch.equal(v, before[k]) for k, v in learner.model.state_dict().items())


@dataclass(frozen=True)
class Factors(fb.Operator):
    """B = P Q of rank 2."""

    parts = ("P", "Q")
    learnable = 2

    def create(self, source: fb.Shape, site: fb.Shape, generator: torch.Generator) -> fb.Weights:
        return torch.randn(*source, 2, generator=generator), torch.randn(
            2, *site, generator=generator
        )

    def send(self, weights: fb.Weights, d: Tensor, site: fb.Shape) -> Tensor:
        return d @ weights[0] @ weights[1]

    def correlate(self, weights: fb.Weights, d: Tensor, h: Tensor, center: bool) -> fb.Weights:
        P, Q = weights
        return d.T @ (h @ Q.T), (d @ P).T @ h

    def macs(self, source: fb.Shape, site: fb.Shape) -> int:
        return 0

    def bytes(self, source: fb.Shape, site: fb.Shape) -> int:
        return 0


def test_fdfa_with_factors_descends_the_distance_to_the_jacobian(noise: list[Tensor]) -> None:
    """Of half of |B - J_hat|^2, by autograd."""
    learner = MLP.attach(fb.rules.FDFA.published(operator=Factors()))
    x, _ = MLP.batch()
    learner.feedback_step(x)
    for edge, J in zip(learner.graph.edges, estimates(learner, x, noise), strict=True):
        P, Q = learner.weights_of(edge)
        truth = torch.autograd.grad((P @ Q - J.detach()).square().sum() / 2, (P, Q))
        assert_close(P.grad, truth[0], edge.site.name)
        assert_close(Q.grad, truth[1], edge.site.name)


def test_attention_has_a_forward_mode_derivative() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Linear(4, 8), layer, nn.Linear(8, 3))
    learner = fb.attach(model, fb.rules.FDFA(), example=torch.randn(2, 5, 4), sites="blocks")
    learner.feedback_step(torch.randn(2, 5, 4))
    assert all(B.grad.any() for B in learner.feedback.parameters())


def test_layers_without_a_forward_mode_derivative_are_refused() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            return 2 * x

        @staticmethod
        def backward(ctx, d):  # type: ignore[no-untyped-def]
            return 2 * d

    model = Net(
        lambda m, x: m.out(Double.apply(m.act(m.a(x)))),
        a=nn.Linear(4, 5),
        act=nn.ReLU(),
        out=nn.Linear(5, 3),
    )
    learner = fb.attach(model, fb.rules.FDFA(), example=torch.randn(2, 4), sites=["act"])
    with pytest.raises(
        fb.FeedbackError, match=r"FDFA differentiates .* forward mode.*Replace that layer"
    ):
        learner.feedback_step(torch.randn(2, 4))


# --- GrAPE -----------------------------------------------------------------------------------------------------


def mean_cosine(B: Tensor, J: Tensor) -> Tensor:
    """Over the units of the output, between their feedback and their row of the Jacobian."""
    return nn.functional.cosine_similarity(B.flatten(1), J.flatten(1)).mean()


@pytest.mark.parametrize("pair", [MLP, CONV, TOKENS], ids=str)
def test_grape_descends_the_alignment_loss(pair: Pair, noise: list[Tensor]) -> None:
    """The gradient of 1 - mean cos(B_c, J_hat_c), by autograd, where each |B_c| is 1; only its norm is put right."""
    learner = pair.attach(fb.rules.GrAPE())
    x, _ = pair.batch(3)
    with torch.no_grad():
        for B in learner.feedback.parameters():
            B.mul_(torch.linspace(0.5, 2, len(B)).view(-1, *[1] * (B.dim() - 1)))
    before = [B.detach().clone() for B in learner.feedback.parameters()]
    learner.feedback_step(x)
    found = estimates(learner, x, noise)
    for edge, J, old in zip(learner.graph.edges, found, before, strict=True):
        B = learner.feedback_of(edge)
        unit = (
            (old.flatten(1) / old.flatten(1).norm(dim=1, keepdim=True))
            .view_as(old)
            .requires_grad_()
        )
        (truth,) = torch.autograd.grad(1 - mean_cosine(unit, J.detach()), unit)
        assert_close(B.grad, truth, edge.site.name)
        assert_close(B.detach(), unit.detach(), edge.site.name)


def test_grape_steps_as_published(noise: list[Tensor]) -> None:
    """A gradient step, then every column back to norm 1: that is what is sent, whatever is stored."""
    learner = MLP.attach(fb.rules.GrAPE())
    x, y = MLP.batch()
    optimizer = torch.optim.SGD(learner.feedback.parameters(), lr=0.7)
    edge = learner.graph.edges[1]
    reference = learner.feedback_of(edge).detach().clone()
    reference /= reference.norm(dim=1, keepdim=True)
    for _ in range(4):
        optimizer.zero_grad()
        noise.clear()
        learner.feedback_step(x)
        J = estimates(learner, x, noise)[1].detach()
        for c in range(3):
            unit, b = J[c] / J[c].norm(), reference[c]
            b = b + 0.7 / 3 * (unit - (unit @ b) * b)
            reference[c] = b / b.norm()
        optimizer.step()
    e = (torch.softmax(learner.model(x), 1) - nn.functional.one_hot(y, 3)) / len(x)
    assert_close(signals(learner, x, y)[edge.site.name], (e @ reference).detach())


def test_grape_between_forward_and_backward_changes_no_signal() -> None:
    learner = MLP.attach(fb.rules.GrAPE())
    x, y = MLP.batch()
    with torch.no_grad():
        for B in learner.feedback.parameters():
            B.mul_(3)
    truth = signals(learner, x, y)
    loss = loss_fn(y)(learner(x))
    learner.zero_grad()
    learner.feedback_step(x)
    loss.backward()
    between = grads(learner.model)
    learner.zero_grad()
    got = signals(learner, x, y)
    for name, gradient in grads(learner.model).items():
        assert_close(between[name], gradient, name)
    for name, signal in got.items():
        assert_close(signal, truth[name], name)


# --- how near the feedback comes to the Jacobian ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "rate"),
    [(fb.rules.FDFA.published(), 0.01), (fb.rules.GrAPE(), 0.3)],
    ids=["fdfa", "grape"],
)
def test_probe_sees_feedback_near_the_jacobian(rule: fb.Rule, rate: float) -> None:
    model, x = linear_net()
    learner = fb.attach(model, rule, example=x)
    y = torch.arange(len(x)) % 3
    optimizer = torch.optim.SGD(learner.feedback.parameters(), lr=rate)
    for _ in range(300):
        optimizer.zero_grad()
        learner.feedback_step(x)
        optimizer.step()
    found = fb.probe(learner, loss_fn(y), x)
    for edge, J in zip(learner.graph.edges, path_products(model, learner), strict=True):
        site = found.sites[edge.site.name]
        B = learner.feedback_of(edge).detach()
        if rule.name == "grape":
            B = B / B.norm(dim=1, keepdim=True)
        cosine = (B * J).sum() / (B.norm() * J.norm())
        assert site.jacobian_cosine == pytest.approx(cosine.item(), abs=1e-9)
        assert site.jacobian_cosine > 0.9
        assert site.cosine > 0.9
    assert "B vs J" in str(found)


@pytest.mark.parametrize("rule", [fb.rules.FDFA(), fb.rules.GrAPE()], ids=["fdfa", "grape"])
def test_a_phase_under_autocast(rule: fb.Rule) -> None:
    """bf16 is fine; under fp16 the loss scale would divide the phase's gradients."""
    learner = fb.attach(CONV.model().float(), rule, example=CONV.batch()[0].float())
    x = CONV.batch()[0].float()
    with torch.autocast("cpu", torch.bfloat16):
        learner.feedback_step(x)
    assert all(
        B.grad.dtype == torch.float32 and B.grad.any() for B in learner.feedback.parameters()
    )
    with (
        torch.autocast("cpu", torch.float16),
        pytest.raises(fb.FeedbackError, match=r"phase .* bf16"),
    ):
        learner.feedback_step(x)


def test_zero_feedback_has_no_direction() -> None:
    with pytest.raises(fb.AttachError, match="zero feedback"):
        fb.rules.GrAPE(init="zeros")
