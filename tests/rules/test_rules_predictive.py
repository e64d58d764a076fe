"""DKP-PC against the paper's recursion in NumPy, against two real updates of the weights, and what it refuses."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from pairs import CONV, F64, MLP, assert_close, grads, loss_fn
from torch import Tensor, nn

import feedbackward as fb

ETA, GAMMA, RATIO = 0.05, 0.2, 0.5
RULE = fb.rules.DKPPC.published(rate=ETA, gamma=GAMMA, ratio=RATIO)
LAYERS = ("0", "2", "4", "6")
NO_F = {"tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2), "linear": (lambda z: z, np.ones_like)}


def squares(y: Tensor):  # type: ignore[no-untyped-def]
    return lambda output: (output - y).square().sum() / (2 * len(y))


def recursion(W, Psi, x, y, f, df, rate_psi, decay):  # type: ignore[no-untyped-def]
    """One batch as published: beliefs are pre-activations, prediction z_l = f(z_{l-1}) W_l^T, eps_L = y - yhat.

    The decays are those of plain SGD: of the weights before the batch.
    """
    n, before = len(x), [w.copy() for w in W]
    z = []
    for w in W:
        z.append((f(z[-1]) if z else x) @ w.T)
    eps = y - z[-1]
    inputs = [x, *map(f, z[:-1])]
    new_psi = [p + rate_psi * (h.T @ eps / n - decay * p) for p, h in zip(Psi, z, strict=False)]
    for i, w in enumerate(W):  # 1: direct Kolen-Pollack, without f'
        sent = eps @ Psi[i].T if i < len(Psi) else eps
        w += ETA * sent.T @ inputs[i] / n

    def errors():  # type: ignore[no-untyped-def]
        below = [x, *map(f, z[:-1])]
        tops = [*z[:-1], y]
        return below, [top - b @ w.T for top, b, w in zip(tops, below, W, strict=True)]

    _, found = errors()  # 2: one step of inference, all layers at once
    for i in range(len(Psi)):
        z[i] = z[i] + GAMMA * (found[i + 1] @ W[i + 1] * df(z[i]) - found[i])
    below, found = errors()
    for i, w in enumerate(W):  # 3: predictive coding
        w += ETA * (RATIO * found[i].T @ below[i] / n - decay * before[i])
    return new_psi


@pytest.mark.parametrize("kind", NO_F)
def test_the_published_recursion(kind: str) -> None:
    """Sites are the layers; W and Psi after every one of several batches."""
    torch.manual_seed(0)
    act = nn.Tanh if kind == "tanh" else nn.Identity
    sizes = (6, 9, 8, 7, 3)
    model = nn.Sequential()
    for a, b in itertools.pairwise(sizes):
        model.extend([nn.Linear(a, b, bias=False), act()])
    model = model[:-1].to(F64)
    learner = fb.attach(model, RULE, example=torch.zeros(2, 6, dtype=F64), sites=list(LAYERS[:-1]))
    W = [model.get_submodule(name).weight.detach().numpy().copy() for name in LAYERS]
    Psi = [learner.feedback_of(edge).detach().numpy().T.copy() for edge in learner.graph.edges]
    groups = fb.param_groups(learner, feedback={"lr": 0.03})
    optimizer = torch.optim.SGD(groups, lr=ETA, weight_decay=0.01)
    for t in range(5):
        x, y = (torch.from_numpy(np.random.default_rng(t).normal(size=(5, k))) for k in (6, 3))
        optimizer.zero_grad()
        squares(y)(learner(x)).backward()
        learner.feedback_step(x, squares(y))
        optimizer.step()
        Psi = recursion(W, Psi, x.numpy(), y.numpy(), *NO_F[kind], rate_psi=0.03, decay=0.01)
        for name, w in zip(LAYERS, W, strict=True):
            assert_close(model.get_submodule(name).weight.detach(), w, name)
        for edge, p in zip(learner.graph.edges, Psi, strict=True):
            assert_close(learner.feedback_of(edge).detach(), p.T, edge.site.name)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("pair", [MLP, CONV], ids=str)
def test_one_step_is_the_two_updates(pair, steps: int) -> None:  # type: ignore[no-untyped-def]
    """With norms, pools and biases: a twin is moved by DKP for real, then segment by segment by the energies."""
    learner = pair.attach(fb.rules.DKPPC.published(rate=ETA, gamma=GAMMA, ratio=RATIO, steps=steps))
    x, y = pair.batch()
    twin = pair.model()
    names = [name for name, _ in twin.named_children()]
    ends = [names.index(site.name) + 1 for site in learner.graph.sites]
    segments = [twin[a:b] for a, b in zip([0, *ends], [*ends, len(names)], strict=True)]
    plain = fb.attach(
        copy.deepcopy(twin), fb.DKP.published(), example=x, sites=pair.sites, error_at=pair.error_at
    )
    for mine, other in zip(plain.feedback.parameters(), learner.feedback.parameters(), strict=True):
        mine.data.copy_(other)
    loss_fn(y)(plain(x)).backward()
    h, z = x, []
    with torch.no_grad():
        for segment in segments[:-1]:
            h = segment(h)
            z.append(h)
        for p, q in zip(twin.parameters(), plain.model.parameters(), strict=True):
            p -= ETA * q.grad

    def energy() -> Tensor:
        tops = [s(b) for s, b in zip(segments, [x, *z], strict=True)]
        gaps = sum(((b - top) ** 2).sum() for b, top in zip(z, tops, strict=False))
        return loss_fn(y)(tops[-1]) + gaps / (2 * len(x))

    for _ in range(steps):
        z = [b.detach().requires_grad_() for b in z]
        slopes = torch.autograd.grad(energy(), z)
        z = [(b - GAMMA * len(x) * s).detach() for b, s in zip(z, slopes, strict=True)]
    twin.zero_grad()
    energy().backward()
    loss_fn(y)(learner(x)).backward()
    changed = copy.deepcopy(dict(learner.model.named_buffers()))
    learner.feedback_step(x, loss_fn(y))
    for name, p in learner.model.named_parameters():
        total = plain.model.get_parameter(name).grad + RATIO * twin.get_parameter(name).grad
        assert_close(p.grad, total, name)
    for mine, other in zip(learner.feedback.parameters(), plain.feedback.parameters(), strict=True):
        assert_close(mine.grad, other.grad)
    for name, buffer in learner.model.named_buffers():  # moved by the training pass alone
        assert torch.equal(buffer, changed[name])


def test_errors_are_everywhere_at_once() -> None:
    """With zero feedback an error goes one site down per step of inference; with feedback all sites have one after one step."""
    x, y = MLP.batch()
    reached = {}
    for init in ("zeros", "kaiming_uniform"):
        learner = MLP.attach(fb.rules.DKPPC.published(operator=fb.Dense(init)))
        loss_fn(y)(learner(x)).backward()
        before = {name: p.grad.clone() for name, p in learner.model.named_parameters()}
        learner.feedback_step(x, loss_fn(y))
        revised = grads(learner.model)
        weights = [name for name in before if name.endswith("weight") and before[name].dim() > 1]
        reached[init] = [not torch.equal(revised[name], before[name]) for name in weights]
    assert all(reached["kaiming_uniform"])
    assert reached["zeros"][-2:] == [True, True]
    assert not any(reached["zeros"][:-2])


def test_what_is_refused() -> None:
    x, y = MLP.batch()
    learner = MLP.attach(RULE)
    with pytest.raises(fb.FeedbackError, match=r"no weight has a gradient.*after the backward"):
        learner.feedback_step(x, loss_fn(y))
    loss_fn(y)(learner(x)).backward()
    with pytest.raises(fb.FeedbackError, match=r"needs the loss in its phase: call"):
        learner.feedback_step(x)
    with pytest.raises(fb.AttachError, match=r"has no part in a mixture"):
        fb.Mixed({"*": RULE})
    for wrong in ({"rate": 0.0}, {"gamma": 0.0}, {"ratio": -1.0}, {"steps": 0}):
        with pytest.raises(fb.AttachError, match="above 0 and one step"):
            fb.rules.DKPPC(**wrong)


def test_the_default_learns_its_feedback_as_dkp_does() -> None:
    """Centred, from zero, sent by an orthogonal matrix: the gradients of B, and the signals, are DKP's."""
    found = []
    for rule in (fb.DKP(), fb.rules.DKPPC()):
        learner = MLP.attach(rule)
        torch.manual_seed(0)
        for B in learner.feedback.parameters():
            nn.init.normal_(B)
        x, y = MLP.batch()
        loss_fn(y)(learner(x)).backward()
        signals = [grad.clone() for grad in grads(learner.model).values() if grad is not None]
        if rule.in_phase:
            learner.feedback_step(x, loss_fn(y))
        found.append(([B.grad for B in learner.feedback.parameters()], signals))
    for one, other in zip(*found, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b)
