"""Rules whose signals need no error: DRTP against loops, DGL against segments trained by themselves."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from pairs import CONV, F64, MLP, TOKENS, VIT, Pair, assert_close, grads, loss_fn, signals
from torch import nn
from torch.nn import functional as F

import feedbackward as fb

# --- DRTP --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("pair", [MLP, CONV, TOKENS], ids=str)
def test_drtp_sends_the_row_of_the_target(pair: Pair, scale: float) -> None:
    """delta h_m = B_{y_m} / M, M the samples, or the samples times the tokens where every token has a target."""
    learner = pair.attach(fb.DRTP())
    x, y = pair.batch()
    learner.target(y, scale)
    found = signals(learner, x, y)
    for edge in learner.graph.edges:
        B = learner.feedback_of(edge).numpy()
        expected = np.zeros((*y.shape, *B.shape[1:]))
        for index in np.ndindex(*y.shape):
            expected[index] = scale * B[y[index]] / y.numel()
        assert_close(found[edge.site.name], expected, edge.site.name)


def test_drtp_of_soft_targets_and_of_ignored_labels() -> None:
    x, y = MLP.batch()
    learner = MLP.attach(fb.DRTP())
    soft = torch.rand(4, 3, dtype=F64)
    learner.target(soft)
    B = learner.feedback_of(learner.graph.edges[0])
    assert_close(signals(learner, x, y)["act1"], soft @ B / 4)
    learner.target(torch.tensor([0, -100, 2, 1]))  # cross-entropy's ignore_index
    assert_close(signals(learner, x, y)["act1"][1], torch.zeros(6, dtype=F64))


def test_drtp_does_not_look_at_the_error() -> None:
    x, y = MLP.batch()
    found = []
    for factor in (1.0, 100.0):
        learner = MLP.attach(fb.DRTP())
        learner.target(y)
        found.append(signals(learner, x, y, lambda out, k=factor: k * loss_fn(y)(out)))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("rule", [fb.DRTP(), fb.DGL()], ids=["drtp", "dgl"])
def test_a_gradient_scaler_would_shrink_the_signals(rule: fb.Rule) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(3, 4)
    learner = fb.attach(model, rule, example=x)
    learner.target(torch.tensor([0, 1, 0]))
    with (
        torch.autocast("cpu", torch.float16),
        pytest.raises(fb.FeedbackError, match=r"GradScaler.*bf16"),
    ):
        learner(x)


# --- DGL ---------------------------------------------------------------------------------------------------------


def stretches(pair: Pair, model: nn.Sequential) -> list[nn.Sequential]:
    """The network cut into modules of its own, after each site."""
    found, layers = [], []
    for name, module in model.named_children():
        layers.append(module)
        if name in pair.cuts:
            found.append(nn.Sequential(*layers))
            layers = []
    return [*found, nn.Sequential(*layers)]


@pytest.mark.parametrize("hidden", [0, 5])
@pytest.mark.parametrize("pair", [MLP, CONV, TOKENS], ids=str)
def test_each_segment_is_trained_by_its_own_loss(pair: Pair, hidden: int) -> None:
    """Against separate trainings: every stretch with its auxiliary classifier on what the stretch below gave, detached."""
    model = pair.model()
    learner = pair.attach(fb.DGL(hidden=hidden), model)
    twin, auxiliaries = copy.deepcopy(model), copy.deepcopy(learner.feedback)
    x, y = pair.batch()
    learner.target(y)
    loss_fn(y)(learner(x)).backward()
    h = x
    for part, local in zip(stretches(pair, twin), [*learner.graph.local, None], strict=True):
        h = part(h.detach())
        output = h if local is None else auxiliaries.get_submodule(local.key)(h)
        F.cross_entropy(output.flatten(0, -2), y.flatten()).backward()
    for name, gradient in grads(twin).items():
        assert_close(model.get_parameter(name).grad, gradient, name)
    for name, gradient in grads(auxiliaries).items():
        assert_close(learner.feedback.get_parameter(name).grad, gradient, name)
        assert gradient.any() or "hidden" in name


def test_no_segment_knows_of_those_above() -> None:
    """Other weights above change nothing below: so the order in which segments are updated changes nothing."""
    x, y = CONV.batch()
    found = []
    for changed in (False, True):
        model = CONV.model()
        if changed:
            nn.init.normal_(model.head.weight)
            nn.init.normal_(model.fc1.weight)
        learner = CONV.attach(fb.DGL(), model)
        learner.target(y)
        loss_fn(y)(learner(x)).backward()
        found.append({n: g for n, g in grads(model).items() if n.startswith(("conv", "bn"))})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)])
def test_the_order_of_the_updates_changes_nothing(order: tuple[int, ...]) -> None:
    """Each segment has an optimizer of its own, and they step in any order, several times."""

    def train(places: tuple[int, ...]) -> dict[str, torch.Tensor]:
        learner = CONV.attach(fb.DGL())
        groups = [
            [learner.model.get_parameter(n) for n in s.parameters] for s in learner.plan.segments
        ]
        groups.append([learner.model.get_parameter(n) for n in learner.plan.head.parameters])
        optimizers = [torch.optim.SGD(group, lr=0.1, momentum=0.9) for group in groups]
        auxiliary = torch.optim.SGD(learner.feedback.parameters(), lr=0.1)
        for seed in range(3):
            x, y = CONV.batch(seed=seed)
            learner.zero_grad()
            learner.target(y)
            learner.backward(x, loss_fn(y), schedule="eager")
            for place in places:
                optimizers[place].step()
            auxiliary.step()
        return learner.state_dict()

    first, second = train((0, 1, 2, 3)), train(order)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_auxiliary_networks_depend_on_the_seed_and_the_site_alone() -> None:
    torch.manual_seed(1)
    first = CONV.attach(fb.DGL(), seed=3).feedback.state_dict()
    torch.manual_seed(2)
    second = CONV.attach(fb.DGL(), seed=3).feedback.state_dict()
    other = CONV.attach(fb.DGL(), seed=4).feedback.state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_what_dgl_cannot_classify_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1))
    with pytest.raises(fb.AttachError, match=r"DGL classifies at site '1'.*no class scores"):
        fb.attach(model, fb.DGL(), example=torch.randn(2, 1, 8, 8))
    with pytest.raises(fb.AttachError, match="hidden >= 0"):
        fb.DGL(hidden=-1)
    VIT.attach(fb.DGL())  # tokens below, one class per sample: flattened


def test_an_activity_that_is_changed_in_place_after_its_cut_is_refused() -> None:
    layers = [torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 6)]
    model = torch.nn.Sequential(*layers, torch.nn.ReLU(inplace=True), torch.nn.Linear(6, 3))
    with pytest.raises(fb.SiteError, match=r"'2' was changed in place after the cut"):
        fb.attach(model, fb.DGL(), example=torch.randn(5, 4), sites=["1", "2"])
