"""Indirect feedback alignment: the error goes up through the forward weights; what it refuses."""

from __future__ import annotations

import itertools

import numpy as np
import oracles
import pytest
import torch
from pairs import CONV, F64, MLP, assert_close, exact_grads, grads, loss_fn, mirrored, signals
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from wired import Net

import feedbackward as fb


def test_ifa_is_the_published_rule() -> None:
    """delta a_1 = (e B_1) f'(a_1), delta a_l = (delta a_{l-1} W_l^T) f'(a_l), in loops; the output layer by its gradient."""
    model = MLP.model()
    x, labels = MLP.batch()
    learner = MLP.attach(fb.rules.IFA(), model)
    signals(learner, x, labels)
    layers = {name: mirrored(name, module) for name, module in model.named_children()}
    values = {"x": x.numpy()}
    h = x.numpy()
    for name, layer in layers.items():
        values[name] = h = layer.forward(h)
    _, e = oracles.cross_entropy(h, labels.numpy())
    slopes = [(values["act1"] > 0) * 1.0, 1 - values["act2"] ** 2, (values["act3"] > 0) * 1.0]
    below = ["x", "act1", "act2"]
    (B,) = learner.feedback.buffers()
    delta = (e @ B.numpy()) * slopes[0]
    for i in (1, 2, 3):
        gradient = sum(np.outer(delta[n], values[below[i - 1]][n]) for n in range(len(x)))
        assert_close(model.get_parameter(f"fc{i}.weight").grad, gradient, f"fc{i}")
        assert_close(model.get_parameter(f"fc{i}.bias").grad, delta.sum(0), f"fc{i}")
        if i < 3:
            W = layers[f"fc{i + 1}"].parameters["weight"]
            delta = np.array([W @ delta[n] for n in range(len(x))]) * slopes[i]
    truth = exact_grads(model, x, labels)
    for name in MLP.head():
        assert_close(model.get_parameter(name).grad, truth[name], name)


def striding() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.Tanh(), nn.Dropout(0.4), nn.Flatten(),
        nn.Linear(24, 5), nn.BatchNorm1d(5), nn.Sigmoid(), nn.Linear(5, 3),
    )  # fmt: skip


def tokens() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(3, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 7)
    )


@pytest.mark.parametrize(
    ("build", "shape", "labels", "sites", "outputs"),
    [
        (striding, (2, 8, 8), (), ["2", "7", "10"], ["0", "4", "8"]),
        (tokens, (5, 3), (5,), ["2", "4"], ["0", "3"]),
    ],
    ids=["conv", "tokens"],
)  # fmt: skip
def test_signals_move_as_the_layers_outputs_would(build, shape, labels, sites, outputs) -> None:  # type: ignore[no-untyped-def]
    """delta h_{l+1} = da_{l+1}/da_l delta h_l in forward mode through the modules between, dropout masks included."""
    torch.manual_seed(0)
    model = build().to(F64)
    x, y = torch.randn(4, *shape, dtype=F64), torch.randint(3, (4, *labels))
    learner = fb.attach(model, fb.rules.IFA(), example=x, sites=sites)
    torch.manual_seed(1)
    got = signals(learner, x, y)
    found: dict[str, Tensor] = {}
    handles = [
        m.register_forward_hook(lambda m, args, out, name=n: found.__setitem__(name, out.detach()))
        for n, m in model.named_children()
    ]
    torch.manual_seed(1)
    output = model(x)
    for handle in handles:
        handle.remove()
    e = _error(output, y)
    (B,) = learner.feedback.buffers()
    first = e.flatten(1) @ B.flatten(1) if not labels else e @ B
    assert_close(got[sites[0]], first.view_as(found[sites[0]]), sites[0])
    masks = {
        n: found[n] / found[str(int(n) - 1)]
        for n, m in model.named_children()
        if isinstance(m, nn.Dropout)
    }
    for (below, above), (start, end) in zip(
        itertools.pairwise(sites), itertools.pairwise(outputs), strict=True
    ):

        def between(a: Tensor, start: str = start, end: str = end) -> Tensor:
            for name in map(str, range(int(start) + 1, int(end) + 1)):
                a = a * masks[name] if name in masks else model.get_submodule(name)(a)
            return a

        with forward_ad.dual_level():
            moving = forward_ad.make_dual(found[start], got[below].view_as(found[start]))  # type: ignore[union-attr]
            moved = forward_ad.unpack_dual(between(moving)).tangent
        assert_close(got[above], moved.reshape(found[above].shape), above)


def _error(output: Tensor, y: Tensor) -> Tensor:
    p = F.softmax(output.detach(), -1)
    return (p - F.one_hot(y, output.shape[-1])) / y.numel()


def test_only_the_first_site_has_feedback() -> None:
    learner = MLP.attach(fb.rules.IFA())
    assert [tuple(B.shape) for B in learner.feedback.buffers()] == [(3, 6)]
    assert not list(learner.feedback.parameters())
    assert "up from act1" in str(learner)
    assert "up from act2" in str(learner)


def test_no_true_gradient_leaks() -> None:
    """With B_1 = 0 only the head learns."""
    learner = MLP.attach(fb.rules.IFA())
    learner.feedback.act1.zero_()
    x, y = MLP.batch()
    loss_fn(y)(learner(x)).backward()
    moving = {
        name
        for name, gradient in grads(learner.model).items()
        if gradient is not None and gradient.any()
    }
    assert moving == set(MLP.head())


def test_probe_and_accumulation() -> None:
    learner = MLP.attach(fb.rules.IFA())
    x, y = MLP.batch()
    before = fb.probe(learner, loss_fn(y), x)
    assert all(-1 <= site.cosine <= 1 for site in before.sites.values())
    loss_fn(y)(learner(x)).backward()
    whole = grads(learner.model)
    learner.zero_grad()
    for part in (slice(0, 1), slice(1, 4)):
        (F.cross_entropy(learner(x[part]), y[part], reduction="sum") / len(x)).backward()
    for name, gradient in grads(learner.model).items():
        assert_close(gradient, whole[name], name)


def test_mixed_and_flipped() -> None:
    x, y = MLP.batch()
    plain, flipped = MLP.attach(fb.rules.IFA()), MLP.attach(fb.rules.Flipped(fb.rules.IFA()))
    one, other = signals(plain, x, y), signals(flipped, x, y)
    for name, signal in one.items():
        assert_close(other[name], -signal, name, tolerance=0.0)  # type: ignore[operator]
    mixed = MLP.attach(fb.Mixed({"act3": fb.DFA(), "*": fb.rules.IFA()}))
    part = signals(mixed, x, y)
    assert_close(part["act2"], one["act2"])
    assert (part["act3"] - one["act3"]).abs().max() > 1e-3  # type: ignore[operator]


def skipping() -> nn.Module:
    return Net(
        lambda m, x: m.out(m.act2(m.b(h)) + h) if (h := m.act1(m.a(x))) is not None else h,
        a=nn.Linear(4, 4), b=nn.Linear(4, 4), act1=nn.ReLU(), act2=nn.ReLU(), out=nn.Linear(4, 3),
    )  # fmt: skip


def jumping() -> nn.Module:
    """The third site is made from the first and the second."""
    return Net(
        lambda m, x: m.out(m.act3(m.c(torch.cat([h, m.act2(m.b(h))], 1)))) if (h := m.act1(m.a(x))) is not None else h,
        a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(8, 4), act1=nn.ReLU(), act2=nn.ReLU(), act3=nn.ReLU(),
        out=nn.Linear(4, 3),
    )  # fmt: skip


def turned() -> nn.Module:
    return Net(
        lambda m, x: m.out(m.act2(m.b(m.act1(m.a(x).transpose(1, 2)))).flatten(1)),
        a=nn.Linear(4, 4), b=nn.Linear(4, 4), act1=nn.ReLU(), act2=nn.ReLU(), out=nn.Linear(16, 3),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("build", "shape", "sites", "told"),
    [
        (skipping, (4,), "layers", r"'out.input' of shape .*skip path leads round them"),
        (jumping, (4,), ["act1", "act2", "act3"], r"from site 'act2' to 'act3', but 'act3' is not made from 'act2' alone"),
        (turned, (4, 4), ["act1", "act2"], r"dimensions change places"),
        (lambda: CONV.build(), (2, 8, 8), ["pool1", "flat"], r"'pool1' of shape \[.*4, 4\].*are \[.*8, 8\].*A pool must"),
    ],
    ids=["skip", "two inputs", "transposed", "pool"],
)  # fmt: skip
def test_what_is_no_plain_chain_is_refused(build, shape, sites, told) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises((fb.AttachError, fb.SiteError), match=told):
        fb.attach(build(), fb.rules.IFA(), example=torch.randn(3, *shape), sites=sites)


def test_frozen_first_layers_are_refused() -> None:
    model = MLP.model()
    model.fc1.requires_grad_(False)
    with pytest.raises(fb.AttachError, match=r"those below 'act1' are frozen: leave out its site"):
        MLP.attach(fb.rules.IFA(), model)
    learner = MLP.attach(fb.rules.IFA(), model, sites=["act2", "act3"])
    x, y = MLP.batch()
    assert set(signals(learner, x, y)) == {"act2", "act3"}


def test_frozen_layers_in_the_middle_pass_signals_on() -> None:
    x, y = MLP.batch()
    whole = signals(MLP.attach(fb.rules.IFA()), x, y)
    model = MLP.model()
    model.fc2.requires_grad_(False)
    part = signals(MLP.attach(fb.rules.IFA(), model), x, y)
    assert_close(part["act3"], whole["act3"])
    assert model.fc2.weight.grad is None


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compilation_leaves_it_to_autograd(backend: str) -> None:
    learner = MLP.attach(fb.rules.IFA())
    x, y = MLP.batch()
    loss_fn(y)(learner(x)).backward()
    truth = grads(learner.model)
    learner.zero_grad()
    torch._dynamo.reset()
    loss_fn(y)(torch.compile(learner, backend=backend)(x)).backward()
    for name, gradient in grads(learner.model).items():
        assert_close(gradient, truth[name], name)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="_uncompiled"):
        torch.compile(learner, backend=backend, fullgraph=True)(x)


def test_replay_is_refused() -> None:
    learner = MLP.attach(fb.rules.IFA())
    x, y = MLP.batch()
    with pytest.raises(fb.AttachError, match=r"IFA's signals go up .*schedule=\"joint\""):
        learner.backward(x, loss_fn(y), schedule="replay")


def test_inplace_changes_are_refused() -> None:
    layers = nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)
    with pytest.raises(fb.SiteError, match=r"'2' was changed in place"):
        fb.attach(
            nn.Sequential(*layers), fb.rules.IFA(), example=torch.randn(3, 4), sites=["1", "2"]
        )
