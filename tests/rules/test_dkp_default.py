"""The default form of DKP: its equation by hand, and what it does not depend on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pairs import F64, MLP, loss_fn, signals
from torch import Tensor, nn

import feedbackward as fb


def feedback_gradients(learner: fb.Learner, x: Tensor, y: Tensor) -> list[Tensor]:
    learner.zero_grad()
    loss_fn(y)(learner(x)).backward()
    return [learner.feedback_of(edge).grad.clone() for edge in learner.graph.edges]  # type: ignore[union-attr]


def _place(model: nn.Module, name: str) -> int:
    """How many children come before the one of this name."""
    return [child for child, _ in model.named_children()].index(name)


def polar(B: np.ndarray) -> np.ndarray:
    """Ten steps of Newton and Schulz on the singular values of B, divided by its norm."""
    u, s, v = np.linalg.svd(B / np.linalg.norm(B), full_matrices=False)
    for _ in range(10):
        s = s * (3 - s**2) / 2
    return (u * s) @ v


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_signals_and_gradients(scale: float) -> None:
    """0.1 e polar(B) and e^T h, in numpy; the scale of B changes nothing."""
    learner = MLP.attach(fb.DKP())
    x, y = MLP.batch()
    with torch.no_grad():
        torch.manual_seed(2)
        for edge in learner.graph.edges:
            learner.feedback_of(edge).normal_(std=scale)
        p = torch.softmax(learner.model(x), 1).numpy()
    sent = signals(learner, x, y)
    made = feedback_gradients(learner, x, y)
    e = (p - np.eye(p.shape[1])[y.numpy()]) / len(x)
    for edge, grad in zip(learner.graph.edges, made, strict=True):
        layers = learner.model[: _place(learner.model, edge.site.points[0].module) + 1]
        with torch.no_grad():
            h = layers(x).numpy()
        B = learner.feedback_of(edge).detach().numpy()
        np.testing.assert_allclose(sent[edge.site.name].numpy(), 0.1 * e @ polar(B), atol=1e-10)
        np.testing.assert_allclose(grad.numpy(), e.T @ h, atol=1e-12)


def test_it_starts_at_zero_and_sends_nothing() -> None:
    learner = MLP.attach(fb.DKP())
    x, y = MLP.batch()
    assert not any(learner.feedback_of(edge).any() for edge in learner.graph.edges)
    assert not any(signal.any() for signal in signals(learner, x, y).values())


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
    assert fb.DKP.published() == fb.DKP(
        center=False, whiten=False, orthogonal=False, operator=fb.Dense()
    )
    assert fb.DKP.published(center=True).center
