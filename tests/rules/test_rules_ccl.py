"""Counter-current learning against losses and a feedback net written in NumPy, and their central differences."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from pairs import CONV, MLP, TOKENS, VIT, Pair, assert_close, loss_fn, signals
from torch import Tensor, nn

import feedbackward as fb
from feedbackward.parallel.routes import refuse_rule
from feedbackward.rules import CCL

Array = np.ndarray
EPS = 1e-6
# the shapes of the feedback at the sites, from the first to the last
SHAPES = {
    "mlp": [(6,), (5,), (6,)],
    "conv": [(4, 4, 4), (6, 2, 2), (5,)],
    "tokens": [(6,), (4,), (5,)],
    "vit": [(6,), (4,)],
}
F = {
    "elu": lambda z: np.where(z > 0, z, np.expm1(z)),
    "relu": lambda z: np.maximum(z, 0),
    "leaky_relu": lambda z: np.where(z > 0, z, 0.01 * z),
    "tanh": np.tanh,
}


def convolved(c: Array, Q: Array) -> Array:
    """A 3x3 convolution with a border of zeros."""
    padded = np.pad(c, ((0, 0), (0, 0), (1, 1), (1, 1)))
    height, width = c.shape[2:]
    out = np.zeros((len(c), len(Q), height, width))
    for o, i, j in np.ndindex(len(Q), height, width):
        out[:, o, i, j] = (padded[:, :, i : i + 3, j : j + 3] * Q[o]).sum((1, 2, 3))
    return out


def enlarged(c: Array, space: tuple[int, ...]) -> Array:
    rows, columns = (
        [k * n // m for k in range(m)] for n, m in zip(c.shape[2:], space, strict=True)
    )
    return c[:, :, rows][:, :, :, columns]


def feedback(pair: Pair, Qs: list[Array], name: str) -> list[Array]:
    """C_l of every site, from the first to the last."""
    c, found = np.eye(pair.classes), []
    for Q, shape in zip(reversed(Qs), reversed(SHAPES[pair.name]), strict=True):
        maps = c.ndim == 4 and len(shape) == 3
        z = convolved(enlarged(c, shape[1:]), Q) if maps else c.reshape(len(c), -1) @ Q.T
        c = F[name](z).reshape(pair.classes, *shape)
        found.append(c)
    return found[::-1]


def rows(pair: Pair, h: Array, y: Tensor) -> Array:
    """One row per target: tokens with labels of their own, tokens averaged, or all features."""
    if y.dim() > 1:
        return h.reshape(y.numel(), -1)
    if pair is VIT and h.ndim == 3:
        return h.mean(1)
    return h.reshape(len(h), -1)


def likeness(a: Array, b: Array) -> Array:
    found = np.zeros((len(a), len(b)))
    for i, j in np.ndindex(*found.shape):
        norms = math.sqrt((a[i] @ a[i]) * (b[j] @ b[j]))
        found[i, j] = a[i] @ b[j] / norms if norms else 0
    return found


def written(rule: CCL, h: Array, c: Array, y: Array) -> float:
    c = c.reshape(len(c), -1)
    wanted = np.array([[float(label == k) for k in range(len(c))] for label in y])
    if not rule.cosine:
        return float(256 / h.shape[1] * np.mean((h @ c.T - wanted) ** 2))
    apart = np.mean((likeness(h, h) - np.eye(len(h))) ** 2)
    apart += np.mean((likeness(c, c) - np.eye(len(c))) ** 2)
    return float(np.mean((likeness(h, c) - wanted) ** 2) + rule.spread * apart)


def attached(pair: Pair, rule: CCL) -> fb.Learner:
    """With weights of the feedback net that are neither small nor alike."""
    learner = pair.attach(rule)
    torch.manual_seed(3)
    for p in learner.feedback.parameters():
        nn.init.normal_(p, std=0.5)
    return learner


def weights(learner: fb.Learner) -> list[Array]:
    """Q of every site, from the first to the last."""
    keys = [end.key for end in reversed(learner.graph.local)]
    own = [learner.feedback.get_submodule(key).layer.weight for key in keys]
    return [Q.detach().numpy().copy() for Q in own]  # type: ignore[union-attr, operator]


@pytest.mark.parametrize(
    "rule",
    [CCL(spread=0.3), CCL("relu"), CCL("tanh", cosine=False), CCL("leaky_relu", spread=0)],
    ids=["elu", "relu", "product", "leaky"],
)
@pytest.mark.parametrize("pair", [MLP, CONV, TOKENS, VIT], ids=str)
def test_gradients_are_the_slopes_of_the_written_loss(pair: Pair, rule: CCL) -> None:
    """Along a random direction at every site and in every Q, so that a central difference checks all entries."""
    learner, (x, y) = attached(pair, rule), pair.batch()
    hs: dict[str, Tensor] = {}
    for site in learner.sites:
        learner.model.get_submodule(site.name).register_forward_hook(
            lambda m, a, out, name=site.name: hs.__setitem__(name, out.detach().clone())
        )
    learner.target(y)
    found = signals(learner, x, y)
    labels, Qs = y.flatten().numpy(), weights(learner)
    for i, end in enumerate(reversed(learner.graph.local)):
        h = hs[end.site.name].numpy()
        random = np.random.default_rng(i)
        u, v = random.normal(size=h.shape), random.normal(size=Qs[i].shape)
        # the feedback comes from the layers above, which this loss does not train
        at_h = [
            written(
                rule, rows(pair, h + s * EPS * u, y), feedback(pair, Qs, rule.activation)[i], labels
            )
            for s in (1, -1)
        ]
        slope = (at_h[0] - at_h[1]) / (2 * EPS)
        assert math.isclose(
            (found[end.site.name].numpy() * u).sum(), slope, rel_tol=1e-5, abs_tol=1e-8
        )
        at_Q = []
        for s in (1, -1):
            moved = [Q + s * EPS * v if k == i else Q for k, Q in enumerate(Qs)]
            at_Q.append(
                written(rule, rows(pair, h, y), feedback(pair, moved, rule.activation)[i], labels)
            )
        slope = (at_Q[0] - at_Q[1]) / (2 * EPS)
        grad = learner.feedback.get_submodule(end.key).layer.weight.grad  # type: ignore[union-attr]
        assert math.isclose((grad.numpy() * v).sum(), slope, rel_tol=1e-5, abs_tol=1e-8)


def test_the_loss_of_a_site_follows_the_layers_above_it_in_copies_too() -> None:
    learner, (x, y) = attached(MLP, CCL()), MLP.batch()
    for twin in (copy.deepcopy(learner), pickle.loads(pickle.dumps(learner))):
        with torch.no_grad():
            for p in twin.feedback.get_submodule(twin.graph.local[0].key).parameters():
                p += 1
        found = []
        for each in (learner, twin):
            each.zero_grad()
            each.target(y)
            loss_fn(y)(each(x)).backward()
            found.append(each.model.fc1.weight.grad)
        assert not torch.allclose(*found)


@pytest.mark.parametrize("cosine", [True, False])
def test_rows_that_the_loss_leaves_out_have_no_signal(cosine: bool) -> None:
    """And they are nobody's neighbours: the others have the signals of a batch without them, up to the mean."""
    learner, (x, y) = attached(MLP, CCL(cosine=cosine, spread=0)), MLP.batch()
    found = []
    for labels in (torch.tensor([0, -100, 2, 1]), y):
        learner.target(labels)
        found.append(signals(learner, x, labels)["act1"])
    assert not found[0][1].any()
    assert found[1][1].any()


def test_seeds_and_round_trips() -> None:
    first, second, other = (MLP.attach(CCL(), seed=seed) for seed in (3, 3, 4))
    pairs = zip(first.feedback.parameters(), second.feedback.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    other.load_state_dict(first.state_dict())
    for a, b in zip(weights(first), weights(other), strict=True):
        assert_close(torch.from_numpy(a), b)


def test_what_it_cannot_serve_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1))
    with pytest.raises(fb.AttachError, match=r"CCL classifies at site '1'"):
        fb.attach(model, CCL(), example=torch.randn(2, 1, 8, 8))
    with pytest.raises(fb.AttachError, match=r"no activation 'gelu': choose one of elu"):
        CCL("gelu")
    with pytest.raises(fb.AttachError, match=r"spread >= 0"):
        CCL(spread=-1)


def test_a_pipeline_would_divide_the_feedback_net() -> None:
    learner = MLP.attach(CCL())
    with pytest.raises(fb.AttachError, match=r"CCL cannot be divided.*a feedback net of its own"):
        refuse_rule(learner.rule, learner.graph, 2)
