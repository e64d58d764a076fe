"""Highway Kolen-Pollack: with every branch it is backprop, with fewer the sum over the paths that pass so many."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import feedbackward as fb
from feedbackward.rules import HighwayKP

F64 = torch.float64
WIDTH, CLASSES = 7, 3


class Block(nn.Module):
    """relu(h + relu(h A) C), with A and C by rows."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH, bias=False)
        self.c = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return F.relu(h + self.c(F.relu(self.a(h))))


class Attention(nn.Module):
    """A pre-norm transformer block of one head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        x = self.norm1(h)
        h = h + self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))
        return h + self.down(F.gelu(self.up(self.norm2(h))))


class Convolutional(nn.Module):
    """A convolution block; one that widens has a padding (option A) or a projection (B) as its skip path."""

    def __init__(self, before: int, after: int, project: bool = False) -> None:
        super().__init__()
        stride = 1 if before == after else 2
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1)
        self.norm1, self.norm2 = nn.BatchNorm2d(after), nn.BatchNorm2d(after)
        self.project = nn.Conv2d(before, after, 1, stride) if project else None
        self.more = after - before

    def forward(self, h: Tensor) -> Tensor:
        skip = h
        if self.project is not None:
            skip = self.project(h)
        elif self.more:
            skip = F.pad(h[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.more))
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(h)))))
        h += skip
        return F.relu(h)


def mlp() -> tuple[nn.Module, Tensor, int]:
    blocks = [Block() for _ in range(3)]
    return nn.Sequential(nn.Linear(5, WIDTH, bias=False), *blocks, head()), torch.randn(6, 5), 3


def transformer() -> tuple[nn.Module, Tensor, int]:
    blocks = [Attention() for _ in range(2)]
    return nn.Sequential(nn.Linear(5, WIDTH), *blocks, head()), torch.randn(6, 4, 5), 4


def convolutional(project: bool = False) -> tuple[nn.Module, Tensor, int]:
    blocks = [Convolutional(4, 4), Convolutional(4, 6, project), Convolutional(6, 6)]
    stem = nn.Conv2d(2, 4, 3, padding=1)
    pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES))
    return nn.Sequential(stem, nn.ReLU(), *blocks, *pool), torch.randn(6, 2, 8, 8), 3


def head() -> nn.Linear:
    return nn.Linear(WIDTH, CLASSES, bias=False)


NETS = {
    "mlp": mlp,
    "transformer": transformer,
    "padded": convolutional,
    "projected": lambda: convolutional(project=True),
}
every_net = pytest.mark.parametrize("name", NETS)


def made(name: str) -> tuple[nn.Module, Tensor, int]:
    torch.manual_seed(0)
    model, x, branches = NETS[name]()
    return model.to(F64), x.to(F64), branches


def loss(output: Tensor) -> Tensor:
    flat = output.flatten(0, -2)
    return F.cross_entropy(flat, torch.arange(len(flat)) % CLASSES)


def gradients(model: nn.Module, run: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    loss(run(x)).backward()
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def tied(learner: fb.Learner) -> fb.Learner:
    """The learner with B = W."""
    with torch.no_grad():
        for edge in learner.graph.edges:
            learner.feedback_of(edge).copy_(learner.model.get_parameter(edge.site.weight))  # type: ignore[attr-defined]
    return learner


@every_net
def test_with_every_branch_it_is_backprop(name: str) -> None:
    model, x, branches = made(name)
    true = gradients(model, copy.deepcopy(model), x)
    plain = copy.deepcopy(model)
    true = gradients(plain, plain, x)
    learner = tied(fb.attach(model, HighwayKP(branches=branches), example=x))
    found = gradients(model, learner, x)
    for key, grad in true.items():
        torch.testing.assert_close(found[key], grad, rtol=1e-12, atol=1e-14, msg=key)


@every_net
def test_one_branch_fewer_is_not(name: str) -> None:
    model, x, branches = made(name)
    plain = copy.deepcopy(model)
    true = gradients(plain, plain, x)
    learner = tied(fb.attach(model, HighwayKP(branches=branches - 1), example=x))
    found = gradients(model, learner, x)
    lowest = next(iter(true))
    assert not torch.allclose(found[lowest], true[lowest], rtol=1e-3)


def naive(model: nn.Module, learner: fb.Learner, x: Tensor, k: int) -> dict[str, np.ndarray]:
    """The gradients of the residual MLP by the recursion of the docstring, in numpy."""
    weights = {n: p.detach().numpy() for n, p in model.named_parameters()}
    back = {e.site.weight: learner.feedback_of(e).detach().numpy() for e in learner.graph.edges}  # type: ignore[attr-defined]
    hs, middles = [x.numpy() @ weights["0.weight"].T], {}
    for i in (1, 2, 3):
        middles[i] = np.maximum(hs[-1] @ weights[f"{i}.a.weight"].T, 0)
        hs.append(np.maximum(hs[-1] + middles[i] @ weights[f"{i}.c.weight"].T, 0))
    logits = hs[-1] @ weights["4.weight"].T
    e = np.exp(logits - logits.max(1, keepdims=True))
    e = e / e.sum(1, keepdims=True)
    e[np.arange(len(e)), np.arange(len(e)) % CLASSES] -= 1
    e /= len(e)
    grads = {"4.weight": e.T @ hs[-1]}
    # w[j]: the error along the paths that pass j branches or fewer; none for j = -1
    w = {-1: np.zeros_like(hs[-1])} | dict.fromkeys(range(k + 1), e @ back["4.weight"])
    for i in (3, 2, 1):
        sums = {j: w[j] * (hs[i] > 0) for j in w}
        inner = {j: (sums[j] @ back[f"{i}.c.weight"]) * (middles[i] > 0) for j in w}
        grads[f"{i}.c.weight"] = sums[k].T @ middles[i]
        grads[f"{i}.a.weight"] = inner[k].T @ hs[i - 1]
        w = {-1: w[-1]} | {j: sums[j] + inner[j - 1] @ back[f"{i}.a.weight"] for j in range(k + 1)}
    grads["0.weight"] = w[k].T @ x.numpy()
    return grads


@pytest.mark.parametrize("k", [0, 1, 2, 3, 5])
def test_it_is_the_recursion(k: int) -> None:
    model, x, _ = made("mlp")
    learner = fb.attach(model, HighwayKP(branches=k, init="xavier_uniform"), example=x)
    found = gradients(model, learner, x)
    for name, grad in naive(model, learner, x, k).items():
        np.testing.assert_allclose(found[name].numpy(), grad, rtol=1e-12, atol=1e-15)
    for edge in learner.graph.edges:
        weight = model.get_parameter(edge.site.weight)  # type: ignore[attr-defined]
        assert torch.equal(learner.feedback_of(edge).grad, weight.grad)


@every_net
def test_a_second_backward_pass_gives_the_same(name: str) -> None:
    model, x, _ = made(name)
    learner = fb.attach(model, HighwayKP(), example=x)
    output = loss(learner(x))
    output.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]
    output.backward()
    for p, grad in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * grad)


@every_net
def test_every_branch_is_found(name: str) -> None:
    model, x, branches = made(name)
    learner = fb.attach(model, HighwayKP(), example=x)
    assert len(learner.graph.branches.inputs) == branches


def test_on_a_plain_net_it_is_kolen_pollack_and_says_so() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.randn(4, 5)
    with pytest.warns(UserWarning, match=r"skip paths.*KolenPollack.*SegmentedKP"):
        learner = fb.attach(copy.deepcopy(model), HighwayKP(), example=x)
    chain = fb.attach(model, fb.KolenPollack(), example=x)
    for one in (learner, chain):
        one(x).square().sum().backward()
    for (name, p), q in zip(learner.named_parameters(), chain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.a(F.layer_norm(h, (WIDTH,)))


def test_a_branch_without_a_first_module_is_refused() -> None:
    model = nn.Sequential(nn.Linear(5, WIDTH), Functional(), head())
    with pytest.raises(fb.AttachError, match=r"begin with a module.*nn\.LayerNorm"):
        fb.attach(model, HighwayKP(), example=torch.randn(4, 5))


def test_a_negative_number_of_branches_is_refused() -> None:
    with pytest.raises(fb.AttachError, match="branches >= 0"):
        HighwayKP(branches=-1)


@pytest.mark.parametrize("branches", [0, 1, 2])
def test_the_products_in_sequence(branches: int) -> None:
    """One for the head, two for each branch on the way, and one for the second layer of the last block."""
    model, x, _ = made("mlp")
    learner = fb.attach(model, HighwayKP(branches=branches), example=x)
    assert fb.count_cost(learner, x).steps == 2 + 2 * branches


def test_a_bound_on_products_is_refused() -> None:
    model, x, _ = made("mlp")
    learner = fb.attach(model, HighwayKP(), example=x)
    with pytest.raises(fb.AttachError, match="some branches"):
        fb.Delayed(learner, steps=2)


class Beside(nn.Module):
    """Two branches beside each other: x + f(x) + g(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = (
            nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.f(x) + self.g(x)


def test_branches_beside_each_other_are_two() -> None:
    """The first sum holds a branch as well, but the skip path through it passes none."""
    model = nn.Sequential(nn.Linear(5, 6), Beside(), Beside(), nn.Linear(6, 3))
    learner = fb.attach(model, HighwayKP(), example=torch.randn(4, 5))
    names = [branch.points[0].module for branch in learner.graph.branches.inputs]
    assert sorted(names) == ["1.f", "1.g", "2.f", "2.g"]
