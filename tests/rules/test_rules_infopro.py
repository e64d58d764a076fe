"""InfoPro: gradients against losses written out by hand, what a local loss may read, and what it does to a schedule."""

from __future__ import annotations

import pytest
import torch
from pairs import CONV, F64, MLP, TOKENS, VIT, Pair, assert_close, grads, loss_fn, signals
from test_rules_local_heads import activities
from torch import Tensor, nn
from torch.nn import functional as F

import feedbackward as fb
from feedbackward.parallel.routes import refuse_rule
from feedbackward.rules import DGL, InfoPro

PAIRS = (MLP, CONV, TOKENS, VIT)


def reconstructed(pair: Pair, h: Tensor, x: Tensor, weights: list[Tensor]) -> Tensor:
    """The input as the decoder of these weights makes it."""
    if pair is CONV and (h.dim() == 4 or h.shape[1] == 24):
        h = h.view(-1, 6, 2, 2) if h.dim() == 2 else h
        W, b, scale, shift, V, c = weights
        large = F.interpolate(h, (8, 8), mode="bilinear", align_corners=True)
        a = F.conv2d(large, W, b, padding=1)
        mean, var = a.mean((0, 2, 3), keepdim=True), a.var((0, 2, 3), keepdim=True, correction=0)
        a = (a - mean) / (var + 1e-5).sqrt() * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
        return F.conv2d(a.clamp(min=0), V, c, padding=1)
    W, b, V, c = weights
    per_token = h.dim() == 3
    rows = h if per_token else h.flatten(1)
    return ((rows @ W.t() + b).clamp(min=0) @ V.t() + c).view(x.shape)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_gradients_are_those_of_the_written_loss(pair: Pair) -> None:
    """With the classifiers that DGL has, whose own tests say that they are right."""
    rule = InfoPro(first=0.2, last=0.7, hidden=5, width=4)
    learner, (x, y) = pair.attach(rule), pair.batch()
    torch.manual_seed(3)
    for p in learner.feedback.parameters():
        nn.init.normal_(p, std=0.5)
    hs = activities(learner, x)
    learner.target(y)
    found = signals(learner, x, y)
    count = len(learner.graph.local)
    for place, local in enumerate(learner.graph.local):
        name, parts = local.site.name, learner.feedback.get_submodule(local.key)
        h = hs[name].requires_grad_()
        weights = [p.detach().clone().requires_grad_() for p in parts.decoder.parameters()]
        scores = parts.head(h).flatten(0, -2)
        rows = y.flatten()
        a = 0.2 + 0.5 * place / (count - 1)
        ce = (scores.logsumexp(1) - scores[torch.arange(len(rows)), rows]).mean()
        squares = (reconstructed(pair, h, x, weights) - x).square().sum() / x.numel()
        expected = torch.autograd.grad(a * ce + (1 - a) * squares, [h, *weights])
        assert_close(found[name], expected[0], name)
        for (key, p), gradient in zip(parts.decoder.named_parameters(), expected[1:], strict=True):
            assert_close(p.grad, gradient, f"{name}: {key}")


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_without_reconstruction_it_is_dgl(pair: Pair) -> None:
    x, y = pair.batch()
    found = []
    for rule in (InfoPro(first=1, last=1), DGL()):
        learner = pair.attach(rule)
        for local in learner.graph.local:
            torch.manual_seed(5)
            network = learner.feedback.get_submodule(local.key)
            for p in getattr(network, "head", network).parameters():
                nn.init.normal_(p)
        learner.target(y)
        loss_fn(y)(learner(x)).backward()
        found.append(grads(learner.model))
    for name, gradient in found[1].items():
        assert_close(found[0][name], gradient, name)


def test_nothing_of_the_input_is_learned_from_elsewhere() -> None:
    """The decoder sees the activity alone, and the input sends no gradient into a segment."""
    x, y = MLP.batch()
    learner = MLP.attach(InfoPro(first=0, last=0))
    learner.target(y)
    first = signals(learner, x, y)
    local = learner.graph.local[0]
    assert local.reads == learner.graph.sites[0]
    assert local.reads not in first
    assert learner.sites == learner.graph.sites[1:]


@pytest.mark.parametrize("pair", PAIRS[:3], ids=str)
def test_eager_equals_joint(pair: Pair) -> None:
    x, y = pair.batch()
    found = []
    for schedule in ("joint", "eager"):
        learner = pair.attach(InfoPro())
        learner.target(y)
        learner.backward(x, loss_fn(y), schedule=schedule)  # type: ignore[arg-type]
        found.append(grads(learner))
    for name, gradient in found[0].items():
        assert_close(found[1][name], gradient, name)


def test_an_input_that_is_changed_in_place_is_refused() -> None:
    layers = [nn.ReLU(inplace=True), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)]
    model = nn.Sequential(*layers)
    x = torch.randn(5, 4)
    learner = fb.attach(model, InfoPro(), example=x)
    learner.target(torch.tensor([0, 1, 2, 0, 1]))
    with pytest.raises(fb.SiteError, match=r"'input' was changed in place"):
        learner(x)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc, self.head = nn.Embedding(9, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.fc(self.embed(x).mean(1))))


def test_what_cannot_be_served_is_refused() -> None:
    with pytest.raises(fb.AttachError, match=r"InfoPro reconstructs the model's one floating"):
        fb.attach(Words(), InfoPro(), example=torch.randint(9, (4, 5)))
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1))
    with pytest.raises(fb.AttachError, match=r"InfoPro classifies at site '1'"):
        fb.attach(model, InfoPro(), example=torch.randn(2, 1, 8, 8))
    for options in ({"first": 1.5}, {"last": -1}, {"width": 0}, {"hidden": -1}):
        with pytest.raises(fb.AttachError, match=r"first and last from 0 to 1"):
            InfoPro(**options)  # type: ignore[arg-type]


def test_it_cannot_be_divided() -> None:
    learner = MLP.attach(InfoPro())
    with pytest.raises(fb.AttachError, match=r"InfoPro cannot be divided.*read an activity"):
        refuse_rule(learner.rule, learner.graph, 2)


def test_reconstruction_learns() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(200, 6, dtype=F64), torch.arange(200) % 2
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2)).to(F64)
    learner = fb.attach(model, InfoPro(first=0.0, last=0.0), example=x)
    (local,) = learner.graph.local
    network = learner.feedback.get_submodule(local.key)

    def gap() -> float:
        return F.mse_loss(network.decoder(model[:2](x)), x).item()

    before = gap()
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        learner.target(y)
        loss_fn(y)(learner(x)).backward()
        optimizer.step()
    assert gap() < 0.3 * before
