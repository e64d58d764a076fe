"""AugLocal: gradients against networks written out by hand, and which layers the auxiliary networks take their form from."""

from __future__ import annotations

import copy
import itertools
import math
from collections import OrderedDict
from fractions import Fraction

import pytest
import torch
from pairs import CONV, F64, MLP, TOKENS, VIT, Pair, assert_close, grads, loss_fn, signals
from test_rules_local_heads import activities
from torch import Tensor, nn
from torch.nn import functional as F

import feedbackward as fb
from feedbackward.rules import AugLocal

# by pair and site, what depth 2 without a taper must make: the classifier follows
WRITTEN = {
    MLP: {"act1": ["linear", "linear"], "act2": ["linear"], "act3": []},
    CONV: {"pool1": ["conv", "linear"], "flat": ["linear"], "act3": []},
    TOKENS: {"norm1": ["linear", "linear"], "act1": ["linear"], "act2": []},
    VIT: {"norm1": ["linear"], "pool": []},
}


def normed(x: Tensor, weight: Tensor, bias: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Batch norm over the samples (and places), or layer norm over the features."""
    mean, var = x.mean(axes, keepdim=True), x.var(axes, keepdim=True, unbiased=False)
    shape = (-1,) + (1,) * (x.dim() - 2)
    return (x - mean) / (var + 1e-5).sqrt() * weight.view(shape) + bias.view(shape)


def written(pair: Pair, h: Tensor, steps: list[str], weights: list[Tensor]) -> Tensor:
    """The scores of the samples, or of the tokens that have labels."""
    if pair is TOKENS:
        h = h.flatten(0, 1)
    if pair is VIT and h.dim() == 3:
        h = h.mean(1)
    if pair is CONV and h.shape[1:] == (24,):
        h = h.view(-1, 6, 2, 2)
    for step in steps:
        W, scale, shift, *weights = weights
        if step == "conv":
            # the geometry of the pair's second convolution
            a = F.conv2d(h, W, None, stride=2, padding=1, groups=2)
            h = normed(a, scale, shift, (0, 2, 3)).clamp(min=0)
            continue
        h = h.mean((2, 3)) if h.dim() == 4 else h
        h = normed(h @ W.t(), scale, shift, (1,) if pair is TOKENS else (0,)).clamp(min=0)
    W, bias = weights
    return h @ W.t() + bias


@pytest.mark.parametrize("pair", WRITTEN, ids=str)
def test_gradients_are_those_of_the_written_networks(pair: Pair) -> None:
    learner, (x, y) = pair.attach(AugLocal(depth=2, taper=0)), pair.batch()
    torch.manual_seed(3)
    for p in learner.feedback.parameters():
        nn.init.normal_(p, std=0.5)
    hs = activities(learner, x)
    learner.target(y)
    found = signals(learner, x, y)
    assert {local.site.name for local in learner.graph.local} == {*WRITTEN[pair]}
    for local in learner.graph.local:
        name = local.site.name
        head = learner.feedback.get_submodule(local.key)
        h = hs[name].requires_grad_()
        weights = [p.detach().clone().requires_grad_() for p in head.parameters()]
        scores = written(pair, h, WRITTEN[pair][name], weights)
        rows = y.flatten()
        loss = (scores.logsumexp(1) - scores[torch.arange(len(rows)), rows]).mean()
        expected = torch.autograd.grad(loss, [h, *weights])
        assert_close(found[name], expected[0], name)
        for (key, p), gradient in zip(head.named_parameters(), expected[1:], strict=True):
            assert_close(p.grad, gradient, f"{name}: {key}")


def widths(learner: fb.Learner) -> list[list[int]]:
    """Of each auxiliary network, the widths that its layers make."""
    return [
        [
            m.weight.shape[0]
            for m in learner.feedback.get_submodule(local.key).modules()
            if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
        ][:-1]
        for local in learner.graph.local
    ]


@pytest.mark.parametrize(("depth", "taper"), [(1, 0.5), (4, 0.0), (5, 0.5), (6, 1.0)])
def test_depth_falls_and_layers_are_chosen_evenly(depth: int, taper: float) -> None:
    """By the formulas of the authors' code, with halves rounded up. Layers are numbered from the input; no two have one width."""
    sizes = list(range(20, 34))
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(sizes[-1], 3))
    learner = fb.attach(model, AugLocal(depth, taper), example=torch.randn(4, 20))
    made, modules = sizes[1:], len(sizes)
    expected = []
    for i in range(modules - 1):
        share = i * taper / (modules - 2)
        d = max(1, round(depth * (1 - share) + share))
        left = len(made) - 1 - i
        chosen = (
            range(i + 1, len(made))
            if d >= left
            else [math.floor(i + Fraction(left, d) * k + Fraction(1, 2)) for k in range(1, d + 1)]
        )
        expected.append([made[k] for k in chosen])
    assert widths(learner) == expected


def test_maps_have_the_sizes_that_they_have_in_the_network() -> None:
    """Whatever lies between a site and the layer whose form is taken: pools, strides, paddings of any kind."""
    model = nn.Sequential(
        OrderedDict(
            a=nn.Conv2d(3, 4, 5), act1=nn.ReLU(),
            b=nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2), act2=nn.ReLU(), pool=nn.MaxPool2d((2, 1)),
            c=nn.Conv2d(6, 5, 4, padding="same", padding_mode="reflect"), act3=nn.ReLU(),
            d=nn.Conv2d(5, 8, (3, 1), groups=1), act4=nn.ReLU(), flat=nn.Flatten(), e=nn.Linear(8 * 4 * 10, 7),
            act5=nn.ReLU(), head=nn.Linear(7, 3),
        )
    )  # fmt: skip
    x, y = torch.randn(4, 3, 28, 23), torch.tensor([0, 1, 2, 0])
    sizes: dict[tuple[int, ...], str] = {}
    for name in "bcde":
        model.get_submodule(name).register_forward_hook(
            lambda m, args, out, name=name: sizes.__setitem__(tuple(out.shape[1:]), name)
        )
    learner = fb.attach(model, AugLocal(depth=9), example=x)
    learner.target(y)
    sizes.clear()
    met: dict[str, list[str]] = {}
    for local in learner.graph.local:
        for m in learner.feedback.get_submodule(local.key).modules():
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                m.register_forward_hook(
                    lambda m, args, out, key=local.site.name: met.setdefault(key, []).append(
                        sizes.get(tuple(out.shape[1:]), "?")
                    )
                )
    loss_fn(y)(learner(x)).backward()
    assert met == {
        "act1": [*"bcde?"],
        "pool": [*"cde?"],
        "act3": [*"de?"],
        "flat": [*"e?"],
        "act5": ["?"],
    }


def test_shortcuts_are_no_layers_above() -> None:
    class Block(nn.Module):
        def __init__(self, a: int, b: int) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(a, b, 3, 2, 1), nn.Conv2d(b, b + 1, 3, 1, 1)
            self.short = nn.Conv2d(a, b + 1, 1, 2)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.conv2(F.relu(self.conv1(x))) + self.short(x))

    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), Block(4, 6), Block(7, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(9, 3),
    )  # fmt: skip
    learner = fb.attach(
        model, AugLocal(depth=9), example=torch.randn(4, 2, 8, 8), sites=["1", "2", "3"]
    )
    assert widths(learner) == [[6, 7, 8, 9], [8, 9], []]


class Gated(nn.Module):
    """Functional activations, so that sites are inputs of layers; and a fully connected layer between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 5, 3), nn.Conv2d(5, 6, 3)
        self.gate, self.fc, self.head = nn.Linear(5, 5), nn.Linear(6, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.b(F.relu(self.a(x))))
        h = F.relu(self.c(h * self.gate(h.mean((2, 3))).sigmoid()[:, :, None, None]))
        return self.head(F.relu(self.fc(h.mean((2, 3)))))


def test_layers_between_convolutions_are_left_out() -> None:
    learner = fb.attach(Gated(), AugLocal(depth=9), example=torch.randn(4, 2, 9, 9))
    found = dict(zip([site.name for site in learner.sites], widths(learner), strict=True))
    assert found == {
        "b.input": [5, 6, 7],
        "gate.input": [5, 7],
        "c.input": [6, 7],
        "fc.input": [7],
        "head.input": [],
    }


def test_weights_are_fresh_and_depend_on_the_seed_and_the_site_alone() -> None:
    torch.manual_seed(1)
    model = CONV.model()
    first = CONV.attach(AugLocal(), model, seed=3).feedback.state_dict()
    with torch.no_grad():
        model.conv2.weight.mul_(2)
    torch.manual_seed(2)
    second = CONV.attach(AugLocal(), copy.deepcopy(model), seed=3).feedback.state_dict()
    other = CONV.attach(AugLocal(), seed=4).feedback.state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_no_segment_knows_of_those_above() -> None:
    x, y = CONV.batch()
    found = []
    for changed in (False, True):
        model = CONV.model()
        if changed:
            for layer in (model.conv2, model.fc1, model.head):
                nn.init.normal_(layer.weight)
        learner = CONV.attach(AugLocal(), model)
        learner.target(y)
        loss_fn(y)(learner(x)).backward()
        found.append({n: g for n, g in grads(model).items() if n.startswith(("conv1", "bn1"))})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_what_cannot_be_served_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1))
    with pytest.raises(fb.AttachError, match=r"AugLocal classifies at site '1'"):
        fb.attach(model, AugLocal(), example=torch.randn(2, 1, 8, 8))
    for options in ({"depth": 0}, {"taper": 1.5}, {"taper": -0.5}):
        with pytest.raises(fb.AttachError, match=r"depth >= 1 and 0 <= taper <= 1"):
            AugLocal(**options)  # type: ignore[arg-type]


def test_it_learns_what_frozen_features_do_not_show() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 6, dtype=F64)
    y = (x[:, 0] * x[:, 1] > 0).long()
    found = []
    for rule in (AugLocal(), fb.Frozen()):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2)
        ).to(F64)
        learner = fb.attach(model, rule, example=x)
        optimizer = torch.optim.Adam(learner.parameters(), lr=0.02)
        for _ in range(150):
            optimizer.zero_grad()
            learner.target(y)
            loss_fn(y)(learner(x)).backward()
            optimizer.step()
        found.append((model(x).argmax(1) == y).double().mean().item())
    assert found[0] > found[1] + 0.1
