"""Han 2020: direct feedback within stages, backprop between them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from pairs import (
    F64,
    assert_close,
    exact_grads,
    grads,
    loss_fn,
    signals,
)
from torch import nn

import feedbackward as fb


def stages(act: Callable[[], nn.Module] = nn.ReLU, size: int = 1) -> nn.Sequential:
    """Two stages of three and two convolutions, and two linear layers: sites a1, a2, a3, pool1, b1, flat, c1."""

    def conv(c: int, n: int) -> nn.Module:
        return nn.Conv2d(c, n, size, padding=size // 2)

    return nn.Sequential(
        OrderedDict(
            stem=conv(2, 4), a1=act(), conv2=conv(4, 5), a2=act(), conv3=conv(5, 4), a3=act(),
            conv4=conv(4, 5), pool1=nn.AvgPool2d(2), conv5=conv(5, 4), b1=act(), conv6=conv(4, 3), flat=nn.Flatten(),
            fc=nn.Linear(3 * 16, 6), c1=act(), head=nn.Linear(6, 3),
        )
    ).double()  # fmt: skip


STAGED = torch.randn(4, 2, 8, 8, dtype=F64, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 1])


def routes(learner: fb.Learner) -> list[tuple[str, str, int | None]]:
    return [
        (e.source.name, e.site.name, getattr(e.operator, "dilation", None))
        for e in learner.graph.edges
    ]


def test_han2020_direct_within_stages_and_backprop_between() -> None:
    learner = fb.attach(stages(), fb.rules.Han2020(), example=STAGED)
    fed = [
        ("a3", "a1", 2),
        ("a3", "a2", 1),
        ("b1", "pool1", 1),
        ("head", "flat", None),
        ("head", "c1", None),
    ]
    assert routes(learner) == fed
    assert [site.name for site in learner.graph.sites] == ["a1", "a2", "pool1", "flat", "c1"]
    assert learner.plan.unreached == ()


@pytest.mark.parametrize(
    ("most", "outputs"),
    [
        (1, ["head"]),
        (2, ["a3", "b1", "head", "head"]),
        (3, ["a3", "a3", "b1", "head", "head"]),
    ],
)
def test_han2020_sites_per_module(most: int, outputs: list[str]) -> None:
    """From the top of a stage; a module of one site is its own output, which backprop feeds."""
    learner = fb.attach(stages(), fb.rules.Han2020(most=most), example=STAGED)
    assert [source for source, _, _ in routes(learner)] == outputs


def test_han2020_is_backprop_in_a_linear_net_with_the_paths_products() -> None:
    """1x1 convolutions without activations: a kernel's centre is all that a direct connection needs."""
    torch.manual_seed(0)
    model = stages(nn.Identity)
    truth = exact_grads(model, STAGED, LABELS)
    sites = ["stem", "conv2", "conv3", "pool1", "conv5", "flat", "fc"]  # not the identities
    learner = fb.attach(model, fb.rules.Han2020(), example=STAGED, sites=sites)
    W = {
        name: p.detach().flatten(1)
        for name, p in model.named_parameters()
        if name.endswith("weight")
    }
    path = {
        "stem": W["conv3.weight"] @ W["conv2.weight"], "conv2": W["conv3.weight"], "pool1": W["conv5.weight"],
        "flat": W["head.weight"] @ W["fc.weight"], "fc": W["head.weight"],
    }  # fmt: skip
    for edge in learner.graph.edges:
        B = learner.feedback_of(edge)
        if B.dim() == 4:
            B.zero_()[:, :, 1, 1] = path[edge.site.name]
        else:
            B.copy_(path[edge.site.name].reshape(B.shape))
    loss_fn(LABELS)(learner(STAGED)).backward()
    for name, gradient in grads(model).items():
        assert_close(gradient, truth[name], name, tolerance=1e-12)


def test_han2020_dilated_kernels_reach_as_far_as_the_layers_they_skip() -> None:
    """An error at one place of a module's output comes to the places that the skipped 3x3 layers could reach: the corners,
    edges and centre of their field."""
    learner = fb.attach(stages(size=3), fb.rules.Han2020(), example=STAGED)
    for edge in learner.graph.edges:
        if edge.source.name != "a3":
            continue
        skipped = {"a1": 2, "a2": 1}[edge.site.name]
        d = torch.zeros(1, 4, 8, 8, dtype=F64)
        d[0, :, 4, 4] = 1.0
        signal = edge.operator.send(learner.weights_of(edge), d, edge.site_shape)[0]
        reached = {tuple(place) for place in signal.abs().sum(0).nonzero().tolist()}
        steps = (-skipped, 0, skipped)
        assert reached == {(4 + i, 4 + j) for i in steps for j in steps}


def test_han2020_signals_against_loops() -> None:
    """delta_i(y) = sum over the points t of B[:, :, t]^T delta_o(y - dilation (t - 1))."""
    model = stages(size=3)
    learner = fb.attach(model, fb.rules.Han2020(), example=STAGED)
    found = signals(learner, STAGED, LABELS)
    for edge in learner.graph.edges[:3]:
        B, r = learner.feedback_of(edge), edge.operator.dilation
        d = found[edge.source.name]
        expected = torch.zeros_like(found[edge.site.name])
        size = expected.shape[-1]
        for i in range(size):
            for j in range(size):
                for s in range(3):
                    for t in range(3):
                        u, v = i - r * (s - 1), j - r * (t - 1)
                        if 0 <= u < size and 0 <= v < size:
                            expected[:, :, i, j] += d[:, :, u, v] @ B[:, :, s, t]
        assert_close(found[edge.site.name], expected, edge.site.name)


def test_han2020_groups() -> None:
    top = [
        nn.Conv2d(4, 6, 1),
        nn.ReLU(),
        nn.Conv2d(6, 4, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 3),
    ]
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), *top).double()
    learner = fb.attach(model, fb.rules.Han2020(groups=2), example=STAGED)
    assert learner.feedback_of(learner.graph.edges[0]).shape == (6, 2, 3, 3)
    with pytest.raises(fb.AttachError, match=r"site 'a2': groups=2 does not divide"):
        fb.attach(stages(), fb.rules.Han2020(groups=2), example=STAGED)
    with pytest.raises(fb.AttachError, match="most >= 0"):
        fb.rules.Han2020(most=-1)
