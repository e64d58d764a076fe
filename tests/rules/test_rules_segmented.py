"""Segmented Kolen-Pollack against a hand-written backward pass, and where segments begin."""

from __future__ import annotations

import itertools

import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from pairs import F64, assert_close
from torch import Tensor, nn
from torch.nn import functional as F

import feedbackward as fb
from feedbackward.rules import SegmentedKP

WIDTHS = (5, 7, 6, 8, 6, 7, 4)


def mlp(widths: tuple[int, ...] = WIDTHS) -> nn.Sequential:
    """Linear layers with tanh between them: the modules 0, 2, 4, ... are the layers."""
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).to(F64)


def entries(learner: fb.Learner) -> list[int]:
    """The layers whose inputs the source feeds directly, by their place among all layers, the lowest first."""
    return [i for i, edge in enumerate(learner.graph.edges, start=1) if edge.shares is None]


def by_hand(
    learner: fb.Learner, x: Tensor, y: Tensor, direct: list[int], strength: float
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of all W and of all B, layer by layer from the top, with nothing but products of matrices."""
    layers = [m for m in learner.model if isinstance(m, nn.Linear)]  # type: ignore[attr-defined]
    B = {edge.site.name: learner.feedback_of(edge).detach() for edge in learner.graph.edges}
    h = [x]
    for i, layer in enumerate(layers):
        a = h[-1] @ layer.weight.detach().T + layer.bias.detach()
        h.append(a if i == len(layers) - 1 else a.tanh())
    error = (h[-1].softmax(1) - F.one_hot(y, h[-1].shape[1])) / len(x)
    delta, grad_w, grad_b = error, [torch.empty(0)] * len(layers), [torch.empty(0)] * len(layers)
    for i in reversed(range(len(layers))):
        grad_w[i] = delta.T @ h[i]
        if i == 0:
            break
        weights = B[f"{2 * i}.input"]
        if i in direct:
            grad_b[i] = error.T @ h[i]
            left, _, right = torch.linalg.svd(weights, full_matrices=False)
            sent = strength * error @ left @ right
        else:
            grad_b[i] = grad_w[i]
            sent = delta @ weights
        delta = sent * (1 - h[i].square())
    return grad_w, grad_b[1:]


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_its_gradients_are_those_of_the_equations(steps: int) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(9, 5, dtype=F64), torch.randint(4, (9,))
    learner = fb.attach(
        mlp(), SegmentedKP(steps=steps, strength=0.3, operator=fb.Dense()), example=x, seed=3
    )
    F.cross_entropy(learner(x), y).backward()
    weights, feedback = by_hand(learner, x, y, entries(learner), 0.3)
    layers = [m for m in learner.model if isinstance(m, nn.Linear)]  # type: ignore[attr-defined]
    for layer, expected in zip(layers, weights, strict=True):
        # ten steps of Newton and Schulz leave a millionth
        torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-3, atol=1e-6)
    for edge, expected in zip(learner.graph.edges, feedback, strict=True):
        grad = learner.feedback_of(edge).grad
        assert grad is not None
        torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-6)


def conv_net() -> nn.Sequential:
    """Four convolutions with norms and pools, and two linear layers."""
    torch.manual_seed(2)
    layers: list[nn.Module] = []
    for before, after, pool in ((2, 4, False), (4, 5, True), (5, 4, False), (4, 6, True)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pool else []
    top = [nn.Flatten(), nn.Linear(24, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3)]
    return nn.Sequential(*layers, *top).to(F64)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_within_a_segment_with_the_weights_as_feedback_it_is_backprop(steps: int) -> None:
    """Of what enters the segment: an exact pass through the model that is cut at the entries, where the signals are known."""
    torch.manual_seed(0)
    x, y = torch.randn(6, 2, 8, 8, dtype=F64), torch.randint(3, (6,))
    rule = SegmentedKP(steps=steps, strength=0.3, operator=fb.Dense())
    learner = fb.attach(conv_net(), rule, example=x, seed=3)
    entry = {edge.site.name: edge for edge in learner.graph.edges if edge.shares is None}
    with torch.no_grad():
        for edge in learner.graph.edges:
            if edge.shares is not None:
                learner.feedback_of(edge).copy_(learner.model.get_parameter(edge.shares))
    cut, h, entered = conv_net(), x, []
    for name, module in cut.named_children():
        if f"{name}.input" in entry:
            B = learner.feedback_of(entry[f"{name}.input"]).detach().flatten(1)
            left, _, right = torch.linalg.svd(B, full_matrices=False)
            entered.append((h, 0.3 * left @ right))
            h = h.detach()
        h = module(h)
    loss = F.cross_entropy(h, y)
    (error,) = torch.autograd.grad(loss, h, retain_graph=True)
    signals = [(h.flatten(1) * (error @ B)).sum() for h, B in entered]
    torch.stack([loss, *signals]).sum().backward()
    F.cross_entropy(learner(x), y).backward()
    for (name, mine), exact in zip(learner.model.named_parameters(), cut.parameters(), strict=True):
        # a bias before batch norm has no gradient but rounding
        torch.testing.assert_close(mine.grad, exact.grad, rtol=1e-3, atol=1e-6, msg=name)


@examples(12, 200)
@given(count=st.integers(2, 14), steps=st.integers(1, 6))
def test_segments_are_few_and_none_takes_more_products_than_steps(count: int, steps: int) -> None:
    """Against the count by hand: the highest segment and each other one have at most `steps` layer inputs."""
    widths = (4,) * (count + 1)
    learner = fb.attach(mlp(widths), SegmentedKP(steps=steps), example=torch.randn(3, 4, dtype=F64))
    starts, inputs = entries(learner), count - 1
    ends = [0, *starts, inputs]
    lengths = [high - low for low, high in itertools.pairwise(ends)]
    assert max(lengths) <= steps
    assert len(starts) == max(0, -(-inputs // steps) - 1)
    assert fb.count_cost(learner, torch.randn(3, 4, dtype=F64)).steps == min(steps, inputs)


def test_a_net_of_few_layers_trains_by_kolen_pollack() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(9, 5, dtype=F64), torch.randint(4, (9,))
    found = []
    for rule in (SegmentedKP(), fb.KolenPollack()):
        learner = fb.attach(mlp(), rule, example=x, seed=3)
        F.cross_entropy(learner(x), y).backward()
        found.append([p.grad for p in learner.parameters()])
    for mine, theirs in zip(*found, strict=True):
        assert mine is not None
        assert theirs is not None
        assert_close(mine, theirs)


class Residual(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        branch = [nn.Linear(6, 6) for _ in range(depth)]
        self.branch = nn.Sequential(*itertools.chain(*((m, nn.Tanh()) for m in branch)))

    def forward(self, h: Tensor) -> Tensor:
        return h + self.branch(h)


def test_a_segment_does_not_begin_beside_a_skip_path() -> None:
    """The error of an input within a branch would not reach what the skip path carries: a segment begins at a layer of all paths."""
    model = nn.Sequential(
        nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), Residual(2), nn.Linear(6, 6), nn.Linear(6, 3)
    )
    learner = fb.attach(model, SegmentedKP(steps=4), example=torch.randn(3, 5))
    sites = [edge.site.name for edge in learner.graph.edges if edge.shares is None]
    assert sites == ["2.input"]
    learner.detach()
    with pytest.raises(fb.AttachError, match="no segment of at most 2 products can end within"):
        fb.attach(model, SegmentedKP(steps=2), example=torch.randn(3, 5))


def test_it_learns_with_one_rate() -> None:
    """A task that frozen layers do not learn: the sign of a product of two inputs."""
    torch.manual_seed(0)
    x = torch.randn(256, 2)
    y = (x[:, 0] * x[:, 1] > 0).long()
    model = nn.Sequential(
        nn.Linear(2, 32),
        nn.Tanh(),
        nn.Linear(32, 32),
        nn.Tanh(),
        nn.Linear(32, 32),
        nn.Tanh(),
        nn.Linear(32, 2),
    )
    learner = fb.attach(model, SegmentedKP(steps=2), example=x)
    optimizer = torch.optim.Adam(learner.parameters(), 0.01)
    for _ in range(150):
        optimizer.zero_grad()
        loss = F.cross_entropy(learner(x), y)
        loss.backward()
        optimizer.step()
    assert loss < 0.1


@pytest.mark.parametrize("steps", [0, -1])
def test_steps_below_one_are_refused(steps: int) -> None:
    with pytest.raises(fb.AttachError, match="steps >= 1"):
        SegmentedKP(steps=steps)
