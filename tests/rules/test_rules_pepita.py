"""PEPITA against two passes in NumPy, and what it refuses."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import oracles
import pytest
import torch
from pairs import CONV, MLP, TOKENS, Pair, assert_close, grads, loss_fn
from torch import Tensor, nn

import feedbackward as fb
from feedbackward.rules import PEPITA

# the same networks, split where the activations begin
PAIRS = (
    replace(MLP, cuts=("fc1", "fc2", "fc3")),
    replace(CONV, cuts=("bn1", "bn2", "fc1")),
    replace(TOKENS, cuts=("fc1", "fc2")),
)


def activation(name: str, a: oracles.Array) -> oracles.Array:
    return np.tanh(a) if name == "fc2" else np.maximum(a, 0)


def passed(net: oracles.Net, x: oracles.Array) -> tuple[dict[str, oracles.Array], oracles.Array]:
    """What enters the activations, and the output."""
    found = {}
    for name, layers in (*net.segments.items(), ("output", net.head)):
        for layer in layers:
            x = layer.forward(x)
        found[name] = x
    return found, x


def expected(
    net: oracles.Net, x: oracles.Array, y: oracles.Array, F: oracles.Array
) -> dict[str, oracles.Array | None]:
    """grad W_l = (h_l - h'_l)^T h'_{l-1} / (N P_l), and the gradient of the head in the first pass."""
    found: dict[str, oracles.Array | None] = {}
    first, output = passed(net, x)
    _, e = oracles.cross_entropy(output, y)
    d = e
    for layer in reversed(net.head):
        d = layer.backward(d)
        found.update({f"{layer.name}.{k}": g for k, g in layer.grads.items()})
    n = y.size
    shift = np.zeros_like(x)
    for m in np.ndindex(*y.shape):
        for c in range(e.shape[-1]):
            shift[m] += n * e[m][c] * F[c]
    second, _ = passed(net, x + shift)
    for name, layers in net.segments.items():
        h, moved = (activation(name, of[name]) for of in (first, second))
        # samples, or samples and tokens; of a map its positions as well
        rows = h.size // h.shape[-1] if y.ndim > 1 else len(h)
        positions = h[0, 0].size if h.ndim == 4 else 1
        d = (h - moved) / (rows * positions)
        for layer in reversed(layers):
            d = layer.backward(d)
            found.update({f"{layer.name}.{k}": g for k, g in layer.grads.items()})
    return found


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_two_passes_equal_the_oracle(pair: Pair) -> None:
    model = pair.model()
    x, y = pair.batch()
    learner = pair.attach(PEPITA(operator=fb.Dense(scale=0.7)), model)
    assert [site.name for site in learner.sites] == ["input", *pair.cuts]
    F = learner.feedback_of(learner.graph.edges[0]).numpy()
    wanted = expected(pair.mirror(model), x.numpy(), y.numpy(), F)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    loss_fn(y)(learner(x)).backward()
    assert {k for k, g in grads(model).items() if g is not None} == set(pair.head())
    buffers = {k: v.clone() for k, v in model.named_buffers()}
    learner.feedback_step(x, loss_fn(y))
    for name, gradient in grads(model).items():
        assert_close(gradient, wanted[name], name)
    # the second pass leaves no trace
    assert all(torch.equal(v, buffers[k]) for k, v in model.named_buffers())
    assert all(torch.equal(p, state[k]) for k, p in model.named_parameters())


def test_the_same_dropout_mask_in_both_passes() -> None:
    """With F so small that nothing moves but by another mask, no layer learns."""
    model = nn.Sequential(
        nn.Linear(4, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)
    )
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    learner = fb.attach(model, PEPITA(operator=fb.Dense(scale=1e-12)), example=x)
    loss_fn(y)(learner(x)).backward()
    learner.feedback_step(x, loss_fn(y))
    assert model[3].weight.grad.abs().max() < 1e-6


def test_layers_stay_as_they_are_without_the_second_pass_and_that_is_said() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    learner = fb.attach(model, PEPITA(), example=x)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(200):
            learner(x)
    assert any("PEPITA learns in a phase of its own" in str(w.message) for w in seen)
    assert model[0].weight.grad is None
    del y


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc1, self.act, self.fc2 = (
            nn.Embedding(5, 4),
            nn.Linear(4, 6),
            nn.ReLU(),
            nn.Linear(6, 3),
        )

    def forward(self, words: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(self.embed(words).mean(1))))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu())


def test_nets_without_an_input_to_add_to_or_activations_are_refused() -> None:
    with pytest.raises(fb.AttachError, match=r"Words has 0 floating-point inputs"):
        fb.attach(Words(), PEPITA(), example=torch.randint(5, (4, 7)))
    with pytest.raises(fb.SiteError, match=r"no elementwise activation module"):
        fb.attach(Functional(), PEPITA(), example=torch.randn(4, 4))
    with pytest.raises(fb.AttachError, match=r"zero feedback"):
        PEPITA(operator=fb.Dense("zeros"))


def test_activations_that_work_in_place_change_nothing() -> None:
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    found = []
    for in_place in (False, True):
        torch.manual_seed(0)
        layers = [nn.Linear(4, 8), nn.ReLU(in_place), nn.Linear(8, 8), nn.SiLU(in_place)]
        learner = fb.attach(nn.Sequential(*layers, nn.Linear(8, 3)), PEPITA(), example=x)
        loss_fn(y)(learner(x)).backward()
        learner.feedback_step(x, loss_fn(y))
        found.append(list(grads(learner.model).values()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_inputs_by_keyword() -> None:
    x, y = torch.randn(8, 4), torch.randint(3, (8,))

    class Named(nn.Sequential):
        def forward(self, pixels: Tensor) -> Tensor:
            return super().forward(pixels)

    model = Named(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    found = []
    for inputs in (x, {"pixels": x}):
        learner = fb.attach(model, PEPITA(), example=inputs)
        model.zero_grad()
        learner.backward(inputs, loss_fn(y))
        learner.feedback_step(inputs, loss_fn(y))
        found.append(model[0].weight.grad.clone())
        learner.detach()
    assert torch.equal(*found)
