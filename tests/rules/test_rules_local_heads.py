"""Local losses of predsim and LLS against losses written in numpy, and their gradients against central differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pairs import CONV, MLP, TOKENS, VIT, Pair, loss_fn, signals
from torch import Tensor, nn

import feedbackward as fb
from feedbackward.rules import LLS, PredSim

Array = np.ndarray
EPS = 1e-6


def rows(pair: Pair, h: Array, y: Tensor) -> Array:
    """One row per target: tokens with labels of their own, tokens averaged, or all features."""
    if y.dim() > 1:
        return h.reshape(y.numel(), -1)
    if pair is VIT and h.ndim == 3:
        return h.mean(1)
    return h.reshape(len(h), -1)


def similarity(x: Array) -> Array:
    found = np.zeros((len(x), len(x)))
    for i, j in np.ndindex(*found.shape):
        a, b = x[i] - x[i].mean(), x[j] - x[j].mean()
        found[i, j] = a @ b / ((1e-8 + np.sqrt(a @ a)) * (1e-8 + np.sqrt(b @ b)))
    return found


def cross_entropy(scores: Array, y: Array) -> float:
    total = np.log(np.exp(scores).sum(1)) - scores[np.arange(len(y)), y]
    return float(total.mean())


def convolved(h: Array, W: Array) -> Array:
    """A 3x3 convolution with a border of zeros."""
    padded = np.pad(h, ((0, 0), (0, 0), (1, 1), (1, 1)))
    height, width = h.shape[2:]
    return sum(  # type: ignore[return-value]
        np.einsum("nihw,oi->nohw", padded[:, :, a : a + height, b : b + width], W[:, :, a, b])
        for a in range(3)
        for b in range(3)
    )


def reduced(x: Array) -> Array:
    """What similarities compare: of maps the standard deviation of each channel."""
    if x.ndim > 2 and x.shape[1] > 3:
        return x.reshape(*x.shape[:2], -1).std(2, ddof=1)
    return x.reshape(len(x), -1)


def predsim(pair: Pair, head: nn.Module, h: Array, y: Tensor, beta: float, bio: bool) -> float:
    own = {k: v.detach().numpy() for k, v in head.state_dict().items()}
    if pair is CONV and h.shape[1] == 24:
        # what the flatten of the pair was given
        h = h.reshape(len(h), 6, 2, 2)
    labels, maps = y.flatten().numpy(), pair is CONV and h.ndim == 4
    z = rows(pair, h, y)
    scores = z @ own["decoder.weight"].T + own["decoder.bias"]
    wanted = np.eye(pair.classes)[labels]
    if bio:
        wanted = wanted @ own["projection"]
        signs = wanted > 0
        prediction = float(np.mean(np.log1p(np.exp(scores)) - scores * signs))
        compared = h if maps else z
    else:
        prediction = cross_entropy(scores, labels)
        compared = convolved(h, own["layer.weight"]) if maps else z @ own["layer.weight"].T
    gap = similarity(reduced(compared)) - similarity(wanted)
    return (1 - beta) * prediction + beta * float(np.mean(gap**2))


def lls(pair: Pair, head: nn.Module, h: Array, y: Tensor, tau: float, modulation: str) -> float:
    if pair is CONV and h.shape[1] == 24:
        h = h.reshape(len(h), 6, 2, 2)
    z = rows(pair, h, y)  # the maps of the pair are no larger than 4 x 4, or pooled below
    if pair is CONV and h.ndim == 4 and h.shape[2] > 4:
        k = h.shape[2] // 4
        z = h.reshape(len(h), h.shape[1], 4, k, 4, k).mean((3, 5)).reshape(len(h), -1)
    z = z / np.sqrt((z**2).sum(1, keepdims=True))
    f = np.linspace(50, 512, pair.classes)
    scores = np.zeros((len(z), pair.classes))
    for c in range(pair.classes):
        scores[:, c] = z @ np.sin(f[c] * np.arange(z.shape[1])).astype(np.float32)
    M = {k: v.detach().numpy() for k, v in head.state_dict().items()}.get("modulation")
    if modulation != "none":
        scores = scores @ M if modulation == "mix" else scores * M
    return cross_entropy(scores / tau, y.flatten().numpy())


def trained(pair: Pair, rule: fb.Rule) -> tuple[fb.Learner, Tensor, Tensor]:
    """A learner whose auxiliary weights are not those of the start, some of which are zero."""
    learner = pair.attach(rule)
    torch.manual_seed(3)
    for p in learner.feedback.parameters():
        nn.init.normal_(p, std=0.5)
    return learner, *pair.batch()


def activities(learner: fb.Learner, x: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    handles = [
        learner.model.get_submodule(site.points[0].module).register_forward_hook(
            lambda m, a, out, name=site.name: found.__setitem__(name, out.detach().clone())
        )
        for site in learner.sites
    ]
    with learner.exact(), torch.no_grad():
        learner(x)
    for handle in handles:
        handle.remove()
    return found


RULES = {
    "predsim": PredSim(similarity=0.7),
    "pred": PredSim(similarity=0.0),
    "lls": LLS(temperature=0.5),
    "lls-m": LLS(modulation="class"),
    "lls-mxm": LLS(modulation="mix"),
}


def naive(pair: Pair, rule: fb.Rule, head: nn.Module, h: Array, y: Tensor) -> float:
    if isinstance(rule, PredSim):
        return predsim(pair, head, h, y, rule.similarity, rule.bio)
    assert isinstance(rule, LLS)
    return lls(pair, head, h, y, rule.temperature, rule.modulation)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("pair", [MLP, CONV, TOKENS, VIT], ids=str)
def test_signals_are_the_slopes_of_the_written_loss(pair: Pair, name: str) -> None:
    """Along a random direction at every site, so that one central difference checks all entries."""
    rule = RULES[name]
    learner, x, y = trained(pair, rule)
    hs = activities(learner, x)
    learner.target(y)
    found = signals(learner, x, y)
    for local in learner.graph.local:
        h, head = hs[local.site.name], learner.feedback.get_submodule(local.key)
        u = torch.randn(h.shape, dtype=h.dtype, generator=torch.Generator().manual_seed(7))
        up, down = (naive(pair, rule, head, (h + sign * EPS * u).numpy(), y) for sign in (1, -1))
        slope = (up - down) / (2 * EPS)
        assert math.isclose((found[local.site.name] * u).sum(), slope, rel_tol=1e-5, abs_tol=1e-8)


@pytest.mark.parametrize("pair", [MLP, CONV, TOKENS], ids=str)
def test_the_bio_form_sends_its_error_through_the_fixed_matrix(pair: Pair) -> None:
    rule = PredSim(similarity=0.0, bio=True, targets=6)
    learner, x, y = trained(pair, rule)
    hs = activities(learner, x)
    learner.target(y)
    found = signals(learner, x, y)
    for local in learner.graph.local:
        head = learner.feedback.get_submodule(local.key)
        z = rows(pair, hs[local.site.name].numpy(), y)
        own = {k: v.detach().numpy() for k, v in head.state_dict().items()}
        scores = z @ own["decoder.weight"].T + own["decoder.bias"]
        signs = np.eye(pair.classes)[y.flatten().numpy()] @ own["projection"] > 0
        error = (1 / (1 + np.exp(-scores)) - signs) / scores.size
        expected = (error @ own["back"]).reshape(hs[local.site.name].shape)
        np.testing.assert_allclose(found[local.site.name].numpy(), expected, rtol=1e-9, atol=1e-12)


def test_the_bio_loss_is_the_written_one() -> None:
    rule = PredSim(similarity=1.0, bio=True, targets=6)
    learner, x, y = trained(CONV, rule)
    hs = activities(learner, x)
    for local in learner.graph.local:
        head = learner.feedback.get_submodule(local.key)
        h = hs[local.site.name]
        found = rule.local_loss(head(h), y)
        expected = naive(CONV, rule, head, h.numpy(), y)
        assert math.isclose(found, expected, rel_tol=1e-9)


def test_maps_are_averaged_down_to_what_a_head_reads() -> None:
    x = torch.randn(3, 2, 8, 8)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3))
    learner = fb.attach(model, PredSim(features=64), example=x, sites=["1"])
    head = learner.feedback.get_submodule(learner.graph.local[0].key)
    assert head.decoder.in_features == 64
    h = torch.randn(3, 4, 8, 8)
    expected = h.reshape(3, 4, 4, 2, 4, 2).mean((3, 5)).flatten(1)
    torch.testing.assert_close(head.reader(h), expected)


class Channels(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


@pytest.mark.parametrize("rule", [LLS(side=2), fb.DGL(hidden=0, convs=0)], ids=["lls", "dgl"])
def test_maps_are_told_from_sequences_and_flattened_maps_from_vectors(rule: fb.Rule) -> None:
    """Maps are averaged to a side of 2. Of two dimensions after a flatten nobody knows whether they were a map."""
    convolved = [nn.Conv1d(3, 5, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(40, 3)]
    image = [nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(80, 3)]
    sequence = [Channels(), nn.Linear(3, 8), nn.ReLU(), nn.Flatten(), nn.Linear(40, 3)]
    cases: list[tuple[list[nn.Module], tuple[int, ...], str, int]] = [
        (convolved, (3, 8), "1", 5 * 2),
        (convolved, (3, 8), "2", 5 * 8),
        (image, (3, 4, 4), "1", 5 * 2 * 2),
        # DGL's head of a flattened map is dense
        (image, (3, 4, 4), "2", 5 * 2 * 2 if rule.name == "lls" else 5 * 4 * 4),
        # LLS averages tokens, DGL reads them all
        (sequence, (3, 5), "2", 8 if rule.name == "lls" else 5 * 8),
    ]
    for layers, shape, site, width in cases:
        x, y = torch.randn(4, *shape), torch.arange(4) % 3
        learner = fb.attach(nn.Sequential(*layers), rule, example=x, sites=[site])
        (local,) = learner.graph.local
        head = learner.feedback.get_submodule(local.key)
        features = [m.in_features for m in head.modules() if isinstance(m, nn.Linear)]
        assert (features or [head.waves.shape[1]]) == [width], (shape, site)
        learner.target(y)
        loss_fn(y)(learner(x)).backward()
        assert all(p.grad is not None for p in learner.parameters())


def test_what_is_left_to_learn() -> None:
    """LLS without a modulation has no weights of its own; what it has is no parameter."""
    assert not list(CONV.attach(LLS()).feedback.parameters())
    assert list(CONV.attach(LLS(modulation="mix")).feedback.parameters())
    assert not LLS().learned
    assert LLS(modulation="class").learned


def test_dead_units_and_constant_maps_give_finite_gradients() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    nn.init.constant_(model[0].bias, -100.0)
    x, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 0, 1])
    for rule in (PredSim(), LLS()):
        learner = fb.attach(model, rule, example=x, sites=["1"])
        learner.target(y)
        loss_fn(y)(learner(x)).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in learner.parameters())


@pytest.mark.parametrize(
    "make",
    [lambda: PredSim(similarity=2), lambda: LLS(side=0), lambda: LLS(modulation="all")],  # type: ignore[arg-type]
)
def test_options_are_checked(make: object) -> None:
    with pytest.raises(fb.AttachError, match=r"similarity|side|modulation"):
        make()  # type: ignore[operator]
