"""The default form of DKP: its equation by hand, and what it does not depend on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pairs import F64, MLP, loss_fn
from torch import Tensor, nn

import feedbackward as fb


def feedback_gradients(learner: fb.Learner, x: Tensor, y: Tensor) -> list[Tensor]:
    learner.zero_grad()
    loss_fn(y)(learner(x)).backward()
    return [learner.feedback_of(edge).grad.clone() for edge in learner.graph.edges]  # type: ignore[union-attr]


def _place(model: nn.Module, name: str) -> int:
    """How many children come before the one of this name."""
    return [child for child, _ in model.named_children()].index(name)


def test_the_gradient_is_centred_and_divided_by_the_spread() -> None:
    """30 e^T (h - mean) / (s^2 + 30 s), s^2 = 1/N sum_i |h_i - mean|^2, in numpy; B starts at zero."""
    learner = MLP.attach(fb.DKP())
    x, y = MLP.batch()
    places = [edge.site.points[0].module for edge in learner.graph.edges]
    found = feedback_gradients(learner, x, y)
    with torch.no_grad():
        p = torch.softmax(learner.model(x), 1).numpy()
        activities = [
            learner.model[: _place(learner.model, name) + 1](x).numpy() for name in places
        ]
    e = (p - np.eye(p.shape[1])[y.numpy()]) / len(x)
    for edge, h, grad in zip(learner.graph.edges, activities, found, strict=True):
        assert not learner.feedback_of(edge).any()
        centred = h - h.mean(0)
        s = np.sqrt((centred**2).sum() / len(h))
        np.testing.assert_allclose(grad.numpy(), 30 * e.T @ centred / (s**2 + 30 * s), atol=1e-12)


@pytest.mark.parametrize("width", [3, 30, 3000])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_the_readout_never_moves_further_than_the_error(width: int, scale: float) -> None:
    """|h grad^T| <= gain |e| for any number of features and, where they are large, by any scale of them."""
    generator = torch.Generator().manual_seed(width)
    h = scale * torch.randn(8, width, dtype=F64, generator=generator)
    d = torch.randn(8, 3, dtype=F64, generator=generator)
    model = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, 3)).to(F64)
    learner = fb.attach(model, fb.DKP(), example=torch.randn(2, 2, dtype=F64))
    (edge,) = learner.graph.edges
    (grad,) = learner.rule.feedback_grad(edge, learner.weights_of(edge), d, h)
    moved = (h - h.mean(0)) @ grad.T
    assert moved.norm() <= 30 * 8 * d.norm()
    assert grad.norm() <= 8 * d.norm()


def test_activities_that_do_not_vary_teach_nothing() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).to(F64)
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    x, y = torch.randn(6, 5, dtype=F64), torch.tensor([0, 1, 2, 0, 1, 2])
    (grad,) = feedback_gradients(fb.attach(model, fb.DKP(), example=x), x, y)
    assert not grad.any()


@pytest.mark.parametrize(
    "operator", [fb.Dense("zeros"), fb.LowRank(2), fb.Sparse(2), fb.Pooled()], ids=repr
)
def test_it_scales_with_the_loss_whatever_the_operator(operator: fb.Operator) -> None:
    """So that a gradient scaler may scale the loss."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 3, padding=1), nn.Flatten()
    ).to(F64)
    x = torch.randn(4, 2, 3, 3, dtype=F64)
    learner = fb.attach(model, fb.DKP(operator=operator), example=x)
    found = []
    for scale in (1.0, 8.0):
        learner.zero_grad()
        (scale * learner(x).square().mean()).backward()
        found.append([p.grad.clone() for p in learner.feedback.parameters()])
    for one, eight in zip(*found, strict=True):
        torch.testing.assert_close(eight, 8 * one)


def test_the_published_form_is_an_option() -> None:
    assert fb.DKP.published() == fb.DKP(center=False, normalise=False, operator=fb.Dense())
    assert fb.DKP.published(center=True).center


def test_what_varies_by_rounding_alone_is_not_learned() -> None:
    """Features that differ in their last bits would otherwise be blown up to full size."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 3))
    with torch.no_grad():
        model[0].weight.mul_(1e-7)
    x, y = torch.randn(6, 5), torch.tensor([0, 1, 2, 0, 1, 2])
    (grad,) = feedback_gradients(fb.attach(model, fb.DKP(), example=x), x, y)
    assert grad.norm() <= 6
