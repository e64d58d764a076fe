"""Signals, parameter gradients and feedback gradients of every rule against naive references, in float64."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from pairs import (
    CONV,
    F64,
    MLP,
    PAIRS,
    Pair,
    assert_close,
    exact_grads,
    grads,
    loss_fn,
    mirrored,
    signals,
)
from rows import DIRECT, ROWS, Row
from torch import Tensor, nn
from torch.nn import functional as F

import feedbackward as fb


def feedback_arrays(learner: fb.Learner) -> dict[str, np.ndarray]:
    return {e.site.name: learner.feedback_of(e).detach().numpy() for e in learner.graph.edges}


def check(learner: fb.Learner, expected: oracles.Step, got: dict[str, Tensor | None]) -> None:
    for site in learner.sites:
        assert_close(got.get(site.name), expected.signals[site.name], f"signal at {site.name}")
    for name, gradient in grads(learner.model).items():
        assert_close(gradient, expected.parameters[name], name)
    for edge in learner.graph.edges:
        assert_close(
            learner.feedback_of(edge).grad,
            expected.feedback.get(edge.site.name),
            f"feedback of {edge.site.name}",
        )


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_step_equals_the_oracle(pair: Pair, row: Row) -> None:
    model = pair.model()
    x, y = pair.batch()
    learner = pair.attach(row.rule, model)
    assert tuple(site.name for site in learner.sites) == pair.cuts
    expected = oracles.step(pair.mirror(model), x.numpy(), y.numpy(), row, feedback_arrays(learner))
    got = signals(learner, x, y)
    check(learner, expected, got)
    assert loss_fn(y)(model(x)).item() == pytest.approx(expected.loss, abs=1e-12)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_oracle_chain_is_backprop(pair: Pair) -> None:
    """The hand-derived local gradients themselves, against autograd."""
    model = pair.model()
    x, y = pair.batch()
    expected = oracles.step(pair.mirror(model), x.numpy(), y.numpy(), ROWS[0], {})
    for name, gradient in exact_grads(model, x, y).items():
        assert_close(gradient, expected.parameters[name], name)


@pytest.mark.parametrize("row", DIRECT, ids=str)
@pytest.mark.parametrize("pair", [p for p in PAIRS if p.error_at], ids=str)
def test_error_of_a_hidden_layer(pair: Pair, row: Row) -> None:
    """Above a hidden source everything is backprop, and what is sent is the true error there."""
    model = pair.model()
    x, y = pair.batch()
    truth = exact_grads(model, x, y)
    learner = pair.attach(row.rule, model)
    signals(learner, x, y)
    for name, gradient in grads(model).items():
        if name in pair.head():
            assert_close(gradient, truth[name], name)
        elif truth[name].abs().max() > 1e-9:  # a bias before batch norm has no gradient at all
            assert (gradient - truth[name]).abs().max() > 1e-6, f"{name} has the true gradient"
    assert list(learner.plan.head.parameters) == pair.head()


def test_token_wise_feedback_is_shared_by_tokens() -> None:
    """B: [V, D] where source and site are token-wise, [C, T * D] features where only the site is."""
    by_name = {pair.name: pair for pair in PAIRS}
    learner = by_name["tokens"].attach(fb.DKP.published())
    assert {k: tuple(B.shape) for k, B in learner.feedback.named_parameters()} == {
        "norm1": (7, 6),
        "act1": (7, 4),
        "act2": (7, 5),
    }
    learner = by_name["vit"].attach(fb.DKP.published())
    assert {k: tuple(B.shape) for k, B in learner.feedback.named_parameters()} == {
        "norm1": (3, 5, 6),
        "pool": (3, 4),
    }


def test_equal_sizes_do_not_make_tokens() -> None:
    """Five channels are not the five tokens of the source: the layer that made an activity says what its features are."""
    model = nn.Sequential(
        nn.Conv1d(2, 5, 3), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 7)
    )
    learner = fb.attach(model, fb.DFA(), example=torch.randn(3, 2, 8))
    shapes = {
        edge.site.name: (edge.leading, tuple(learner.feedback_of(edge).shape))
        for edge in learner.graph.edges
    }
    assert shapes == {"1": (1, (5 * 7, 5, 6)), "3": (2, (7, 4))}


class Twice(nn.Module):
    """fc1 -> relu -> shared -> relu -> shared -> relu -> head, the activation functional: sites at layers' inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.shared, self.head = nn.Linear(7, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(x))
        x = F.relu(self.shared(x))
        return self.head(F.relu(self.shared(x)))


@pytest.mark.parametrize("row", DIRECT, ids=str)
def test_module_called_twice(row: Row) -> None:
    """One site per call, each with feedback of its own; the shared weights get the sum of both calls."""
    torch.manual_seed(0)
    model = Twice().to(F64)
    x, y = MLP.batch()
    learner = fb.attach(model, row.rule, example=x)
    names = ["shared.input", "shared.input#1", "head.input"]
    assert [site.name for site in learner.sites] == names
    layers = [
        [mirrored(n, model.get_submodule(n)), oracles.ReLU()] for n in ("fc1", "shared", "shared")
    ]
    net = oracles.Net(dict(zip(names, layers, strict=True)), [mirrored("head", model.head)])
    expected = oracles.step(net, x.numpy(), y.numpy(), row, feedback_arrays(learner))
    check(learner, expected, signals(learner, x, y))


@pytest.mark.parametrize("row", DIRECT, ids=str)
@pytest.mark.parametrize("frozen", ["first", "middle"])
def test_frozen_layers(row: Row, frozen: str) -> None:
    """A segment with nothing to train gets no gradient and its feedback none; all others are as if it were trained."""
    model = CONV.model()
    net = CONV.mirror(model)
    names, site = (("conv1", "bn1"), "pool1") if frozen == "first" else (("conv2", "bn2"), "flat")
    for name in names:
        model.get_submodule(name).requires_grad_(False)
    x, y = CONV.batch()
    learner = CONV.attach(row.rule, model)
    expected = oracles.step(net, x.numpy(), y.numpy(), row, feedback_arrays(learner))
    expected.signals[site] = None
    expected.parameters |= {
        name: None for name in expected.parameters if name.split(".")[0] in names
    }
    expected.feedback.pop(site, None)
    check(learner, expected, signals(learner, x, y))


@pytest.mark.parametrize("row", DIRECT, ids=str)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_smaller_batches(row: Row, size: int) -> None:
    """Batches of another size than the example's; a batch of one has no mean to subtract."""
    model = MLP.model()
    x, y = MLP.batch(size)
    learner = MLP.attach(row.rule, model)
    if size < row.least_batch:
        with pytest.raises(fb.SiteError, match="batch of at least 2"):
            learner(x)
        return
    expected = oracles.step(MLP.mirror(model), x.numpy(), y.numpy(), row, feedback_arrays(learner))
    check(learner, expected, signals(learner, x, y))


def test_channels_last_feedback_is_the_same_feedback() -> None:
    """The memory layout of B and h changes no number."""
    model = CONV.model()
    x, y = CONV.batch()
    pair_sites = ["act1", "act2"]
    plain = fb.attach(model, fb.DKP.published(center=True), example=x, sites=pair_sites)
    expected = signals(plain, x, y)
    truth = {**grads(model), **grads(plain.feedback)}
    plain.detach()
    model.zero_grad()
    learner = fb.attach(model, fb.DKP.published(center=True), example=x, sites=pair_sites).to(
        memory_format=torch.channels_last
    )
    B = learner.feedback.act1
    assert not B.is_contiguous()
    got = signals(learner, x.to(memory_format=torch.channels_last), y)
    for name, signal in got.items():
        assert_close(signal, expected[name], name)
    for name, gradient in {**grads(model), **grads(learner.feedback)}.items():
        assert_close(gradient, truth[name], name)


@pytest.mark.parametrize("row", DIRECT, ids=str)
def test_outputs_without_a_feature_dimension(row: Row) -> None:
    """A regression model that returns [N]: C = 1."""
    torch.manual_seed(0)

    class Scalar(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).squeeze(-1)

    model = Scalar(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 1)).to(F64)
    x, _ = MLP.batch()
    learner = fb.attach(model, row.rule, example=x)
    got = signals(learner, x, x, loss=lambda out: out.pow(2).mean())
    with torch.no_grad():
        h = model[1](model[0](x))
        e = 2 * model(x).numpy() / len(x)
    B = feedback_arrays(learner)["1"]
    assert B.shape == (1, 5)
    known = oracles.Known(e[:, None], h.numpy(), B, None)
    assert_close(got["1"], row.signal(known), "signal")
    if row.feedback is not None:
        assert_close(
            learner.feedback_of(learner.graph.edges[0]).grad, row.feedback(known), "feedback"
        )
