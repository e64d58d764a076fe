"""Decorrelated layers: their numbers, gradients and updates against the formulas, and learners of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import feedbackward as fb
from feedbackward.decorrelation import Decorrelated, Decorrelation

LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (5, 6)),
    "linear, tokens": (lambda: nn.Linear(6, 4, bias=False), (5, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), (5, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, (3, 2), stride=(1, 2), padding=(1, 0)), (5, 3, 6, 7)),
    "conv2d, dilated": (lambda: nn.Conv2d(3, 4, 3, dilation=2, padding=2), (5, 3, 7, 7)),
    "conv2d, same": (lambda: nn.Conv2d(3, 4, 2, padding="same"), (5, 3, 6, 6)),
    "conv2d, circular": (
        lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
        (5, 3, 6, 6),
    ),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, bias=False), (5, 2, 4, 4, 3)),
}


def made(kind: str, seed: int = 0) -> tuple[nn.Module, Decorrelated, Tensor]:
    """The layer, a decorrelated one with the same weights and a random `R`, and an input."""
    torch.manual_seed(seed)
    make, shape = LAYERS[kind]
    layer = make().double()
    (wrapped,) = Decorrelation(make().double(), rate=0.1).layers
    wrapped.load_state_dict(layer.state_dict(), strict=False)
    return layer, wrapped, torch.randn(shape).double()


def naive_patches(layer: Any, x: Tensor) -> Tensor:
    """Row by row: input i of place p is what the output there adds for a weight that is one at i and zero elsewhere."""
    size = layer.weight[0].numel()
    units = torch.eye(size).double().view(size, *layer.weight.shape[1:])
    probe = type(layer).__new__(type(layer))
    probe.__dict__.update(layer.__dict__)
    probe._parameters = {"weight": nn.Parameter(units), "bias": None}
    out = probe(x)
    if isinstance(layer, nn.Linear):
        return out.reshape(-1, size)
    return out.flatten(2).transpose(1, 2).reshape(-1, size)


@pytest.mark.whole
@pytest.mark.parametrize("kind", LAYERS)
def test_a_new_layer_gives_what_it_gave(kind: str) -> None:
    layer, wrapped, x = made(kind)
    torch.testing.assert_close(wrapped(x), layer(x), rtol=1e-12, atol=1e-12)
    one = x[0]
    torch.testing.assert_close(wrapped(one), layer(one), rtol=1e-12, atol=1e-12)


@pytest.mark.whole
@pytest.mark.parametrize("kind", LAYERS)
def test_values_and_gradients_are_those_of_weights_on_turned_inputs(kind: str) -> None:
    layer, wrapped, x = made(kind)
    wrapped.R.copy_(torch.randn_like(wrapped.R))
    patches = naive_patches(layer, x) @ wrapped.R.t()
    y = wrapped(x)
    flat = y if isinstance(layer, nn.Linear) else y.flatten(2).transpose(1, 2)
    flat = flat.reshape(-1, 4)
    W, b = wrapped.weight.detach().flatten(1), wrapped.bias
    expected = patches @ W.t() + (0 if b is None else b.detach())
    torch.testing.assert_close(flat, expected, rtol=1e-10, atol=1e-10)
    d = torch.randn_like(flat)
    flat.backward(d)
    gradient = wrapped.weight.grad.flatten(1)
    torch.testing.assert_close(gradient, d.t() @ patches.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.whole
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("sample", [1, 2])
def test_a_step_is_the_published_one(kind: str, sample: int) -> None:
    layer, _, x = made(kind)
    holder = nn.Sequential(copy.deepcopy(layer))
    decorrelation = Decorrelation(holder, rate=0.1, variance=0.3, sample=sample)
    (wrapped,) = decorrelation.layers
    wrapped.R.copy_(torch.randn_like(wrapped.R))
    R = wrapped.R.clone()
    holder(x)
    decorrelation.step()
    C = torch.zeros_like(R)
    seen = naive_patches(layer, x[::sample]) @ R.t()
    for row in seen:
        C += torch.outer(row, row) / len(seen)
    common = C - torch.diag(torch.diagonal(C))
    sizes = torch.diag(torch.diagonal(C) - 1)
    expected = R - 0.1 * (0.7 * common + 0.3 * sizes) @ R
    torch.testing.assert_close(wrapped.R, expected.detach(), rtol=1e-10, atol=1e-10)


def test_inputs_become_uncorrelated_and_of_size_one() -> None:
    torch.manual_seed(0)
    mix = torch.randn(5, 5) + torch.eye(5)
    model = nn.Sequential(nn.Linear(5, 2))
    decorrelation = Decorrelation(model, rate=0.02, sample=1)
    (layer,) = decorrelation.layers
    for _ in range(3000):
        model(torch.randn(64, 5) @ mix)
        decorrelation.step()
    x = torch.randn(20000, 5) @ mix @ layer.R.t()
    torch.testing.assert_close(x.t() @ x / len(x), torch.eye(5), rtol=0, atol=0.1)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 3),
    )  # fmt: skip


@pytest.mark.parametrize("rule", [fb.DFA, fb.DKP])
@pytest.mark.parametrize("schedule", ["joint", "replay"])
def test_a_learner_gets_the_gradients_of_its_cut_points(rule: Any, schedule: Any) -> None:
    """Those of the same net with W R written out in its layers, times R."""
    x, y = torch.randn(8, 2, 8, 8).double(), torch.randint(3, (8,))
    model, plain = net().double(), net().double()
    decorrelation = Decorrelation(model, rate=0.1)
    for _ in range(3):
        model(x)
        decorrelation.step()
    for layer, old in zip(decorrelation.layers, (plain[i] for i in (0, 4, 7, 9)), strict=True):
        turned = (layer.weight.flatten(1) @ layer.R).view_as(old.weight)
        old.load_state_dict({"weight": turned.detach(), "bias": layer.bias.detach()})
    plain[1].load_state_dict(model[1].state_dict())
    gradients = []
    learners = [fb.attach(one, rule(), example=x, seed=3) for one in (model, plain)]
    assert all(layer.seen is None for layer in decorrelation.layers)
    for learner in learners:
        learner.backward(x, lambda out: F.cross_entropy(out, y), schedule=schedule)
        gradients.append([p.grad for p in learner.model.parameters()])
        # the pass was seen, and replayed or not, R waits for a step
        assert all(layer.seen is not None for layer in decorrelation.layers)
    layers = iter(decorrelation.layers)
    for mine, written_out in zip(*gradients, strict=True):
        expected = written_out
        if mine.dim() > 1:
            expected = (written_out.flatten(1) @ next(layers).R.t()).view_as(mine)
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-11)


def test_the_state_is_whole_and_an_evaluation_leaves_no_trace() -> None:
    x = torch.randn(8, 2, 8, 8)
    model, twin = net(), net()
    decorrelation, other = Decorrelation(model, rate=0.1), Decorrelation(twin, rate=0.1)
    model(x)
    decorrelation.step()
    assert all(layer.seen is None for layer in decorrelation.layers)
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin.eval()(x), model.eval()(x), rtol=0, atol=0)
    assert all(layer.seen is None for layer in other.layers)


def test_a_layer_that_others_share_or_that_has_groups_is_left() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(nn.Conv1d(4, 4, 1, groups=2), nn.Linear(4, 4), shared, nn.Linear(4, 4))
    model[3].weight = shared.weight
    Decorrelation(model, rate=0.1)
    kinds = [type(module).__name__ for module in model]
    assert kinds == ["Conv1d", "DecorrelatedLinear", "Linear", "Linear"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["9"], "no module '9'"),
        (["1"], "a ReLU"),
        (["2"], "groups"),
        ([""], "a Sequential"),
        ([], "name some"),
    ],
)
def test_what_cannot_be_decorrelated_is_told(names: list[str], words: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Conv1d(4, 4, 1, groups=2))
    with pytest.raises(fb.FeedbackError, match=words):
        Decorrelation(model, rate=0.1, layers=names)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("given", [{"rate": 0}, {"rate": 1, "variance": 2}, {"rate": 1, "sample": 0}])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(fb.FeedbackError, match="rate above 0"):
        Decorrelation(net(), **given)


def test_a_step_without_a_pass_is_refused() -> None:
    decorrelation = Decorrelation(net(), rate=0.1)
    with pytest.raises(fb.FeedbackError, match="training pass"):
        decorrelation.step()


def test_a_rate_that_is_too_high_is_told() -> None:
    model = nn.Sequential(nn.Linear(6, 2))
    decorrelation = Decorrelation(model, rate=1.0)

    def train() -> None:
        for _ in range(200):
            model(5 * torch.randn(32, 1).expand(32, 6))
            decorrelation.step()

    with pytest.raises(fb.FeedbackError, match="6 inputs grew without bound: lower the rate"):
        train()


def test_a_chain_refuses_decorrelated_convolutions() -> None:
    """The weight of a decorrelated convolution is no layer's own: a chain would learn another one."""
    model = net()
    Decorrelation(model, rate=0.1)
    with pytest.raises(fb.FeedbackError, match="changes how Conv2d uses its weight"):
        fb.attach(model, fb.FA(), example=torch.randn(8, 2, 8, 8))
