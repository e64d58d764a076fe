"""Muon: orthogonal updates of matrices and kernels as torch.optim.Muon has them, AdamW for all else."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import feedbackward as fb
from feedbackward.optim import Muon, orthogonalized


@pytest.mark.parametrize("shape", [(5, 5), (3, 8), (8, 3), (1, 6)])
def test_singular_values_come_near_one_and_vectors_stay(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    U, _, V = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    S = torch.linspace(0.2, 1, min(shape), dtype=torch.float64)
    found = orthogonalized(U @ S.diag() @ V)
    core = U.T @ found @ V.T
    assert (core.diagonal() > 0.65).all()
    assert (core.diagonal() < 1.25).all()
    torch.testing.assert_close(core, core.diagonal().diag(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_matrices_are_those_of_pytorch(shape: tuple[int, int], nesterov: bool) -> None:
    """PyTorch mixes gradient and momentum by (1 - mu), which the norm takes out, and works in bfloat16."""
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(shape))
    theirs = nn.Parameter(ours.detach().clone())
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.2}
    first = Muon([ours], **options)
    second = torch.optim.Muon([theirs], **options, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        G = torch.randn(shape)
        before = theirs.detach().clone()
        with torch.no_grad():
            ours.copy_(theirs)
        ours.grad, theirs.grad = G.clone(), G.clone()
        first.step()
        second.step()
        assert (
            F.cosine_similarity((ours - before).flatten(), (theirs - before).flatten(), 0) > 0.999
        )
        torch.testing.assert_close(
            (ours - before).norm(), (theirs - before).norm(), rtol=0.02, atol=0
        )


def test_all_else_is_adamw() -> None:
    torch.manual_seed(0)
    kinds = (torch.randn(5), torch.randn(()), torch.randn(4, 3))
    ours = [nn.Parameter(t.double()) for t in kinds]
    theirs = [nn.Parameter(t.double()) for t in kinds]
    groups = [{"params": ours[:2]}, {"params": ours[2:], "matrices": False}]
    options = {"lr": 0.1, "weight_decay": 0.3, "betas": (0.8, 0.9), "eps": 1e-6}
    first, second = Muon(groups, **options), torch.optim.AdamW(theirs, **options)
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        first.step()
        second.step()
    torch.testing.assert_close(ours, theirs)


def test_a_kernel_is_a_matrix_of_its_outputs() -> None:
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(4, 3, 2, 2).double())
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    kernel.grad = torch.randn_like(kernel)
    matrix.grad = kernel.grad.flatten(1).clone()
    for p in (kernel, matrix):
        Muon([p], lr=0.1).step()
    torch.testing.assert_close(kernel.flatten(1), matrix)


def net() -> nn.Module:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*body, nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize("rule", [fb.BP(), fb.DFA(), fb.DKP(), fb.KolenPollack()], ids=repr)
def test_learns_and_goes_on_from_its_state(rule: fb.Rule) -> None:
    torch.manual_seed(1)
    x, y = torch.randn(30, 1, 6, 6), torch.randint(3, (30,))

    def steps(learner: fb.Learner, optimizer: Muon, count: int) -> float:
        for _ in range(count):
            optimizer.zero_grad()
            loss = F.cross_entropy(learner(x), y)
            loss.backward()
            optimizer.step()
        return loss.item()

    learner = fb.attach(net(), rule, example=x)
    optimizer = Muon(learner.parameters(), lr=0.05)
    first = steps(learner, optimizer, 1)
    steps(learner, optimizer, 5)
    file = io.BytesIO()
    torch.save([learner.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    last = steps(learner, optimizer, 15)
    assert last < 0.8 * first

    other = fb.attach(net(), rule, example=x)
    resumed = Muon(other.parameters(), lr=0.5)
    weights, state = torch.load(file, weights_only=True)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    assert steps(other, resumed, 15) == last


def test_a_step_without_a_gradient_leaves_a_parameter_alone() -> None:
    p, q = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    Muon([p, q], lr=0.1).step()
    assert (p == 1).all()
    assert (q == 1).all()


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="momentum in"):
        Muon([nn.Parameter(torch.ones(2))], momentum=1.0)
