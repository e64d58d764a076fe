"""Sign-concordant chains: uSF, brSF, frSF and sign-symmetry against naive references; magnitudes that are drawn anew."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from chains import F64, chain_step, layer_of, step, weight_of
from pairs import CONV, MLP, Pair, assert_close, grads, loss_fn
from reference import make_biotorch
from torch import nn

import feedbackward as fb
from feedbackward.operators.counter import uniform

SIGNED = {
    "usf": fb.rules.USF(),
    "usf, like the layer": fb.rules.USF(init="like_layer", scale=2.0),
    "usf, following": fb.rules.USF(follow_norm=True),
    "frsf": fb.rules.FRSF(),
    "frsf, following": fb.rules.FRSF(follow_norm=True),
    "brsf": fb.rules.BRSF(),
    "brsf, following": fb.rules.BRSF(follow_norm=True),
    "sign_symmetry": fb.rules.SignSymmetry(),
    "sign_symmetry, random": fb.rules.SignSymmetry(magnitude="random", scale=0.5),
}


def hashed(key: int, count: int, size: int) -> np.ndarray:
    """The documented hash in 32-bit arithmetic, number by number."""

    def mix(x: int) -> int:
        x = (x ^ (x >> 16)) * 0x21F0AAAD % 2**32
        x = (x ^ (x >> 15)) * 0x735A2D97 % 2**32
        return x ^ (x >> 15)

    stream = mix(mix(key % 2**32 ^ mix(count)) ^ key // 2**32)
    return np.array([(mix(mix(i) ^ stream) // 256) / 2**24 for i in range(size)])


def expected_feedback(learner: fb.Learner, edge: fb.Edge) -> np.ndarray:
    """B from the papers' equations: a magnitude times the sign of W."""
    rule, W = learner.rule, weight_of(learner, edge).detach().numpy()
    out, into, field = W.shape[0], W.shape[1], math.prod(W.shape[2:])
    xavier = math.sqrt(6 / ((out + into) * field))  # the bound of the law
    if isinstance(rule, fb.rules.USF):
        std = (
            1 / math.sqrt(3 * into * field) if rule.init == "like_layer" else xavier / math.sqrt(3)
        )
        M = rule.scale * std * np.ones(W.shape)
    elif isinstance(rule, fb.rules.SignSymmetry) and rule.magnitude == "uniform":
        s = math.sqrt(2 / (field * out)) if W.ndim > 2 else 1 / math.sqrt(into)
        M = s * np.ones(W.shape)
    elif isinstance(rule, fb.rules.BRSF):
        key, count = learner.feedback_of(edge).tolist()
        M = xavier * hashed(key, count, W.size).reshape(W.shape)
    else:
        M = learner.feedback_of(edge).numpy()
        authors = math.sqrt(6 / (field * out)) if W.ndim > 2 else 1 / math.sqrt(into)
        bound = xavier if isinstance(rule, fb.rules.FRSF) else 0.5 * authors
        assert M.min() >= 0
        assert 0.7 * bound < M.max() <= bound * (1 + 1e-6)
    B = M * np.sign(W)
    if getattr(rule, "follow_norm", False):
        B *= np.linalg.norm(W) / np.linalg.norm(B)
    return B


@pytest.mark.parametrize("rule", SIGNED.values(), ids=SIGNED)
@pytest.mark.parametrize("pair", [MLP, CONV], ids=str)
def test_gradients_equal_the_oracle_in_every_pass(pair: Pair, rule: fb.Rule) -> None:
    """Also after an update has turned some signs round."""
    model = pair.model()
    learner = pair.attach(rule, model)
    for _ in range(2):
        got = step(learner, *pair.batch())
        B = {layer_of(edge): expected_feedback(learner, edge) for edge in learner.graph.edges}
        assert len(B) == 3
        for name, gradient in chain_step(pair, model, B).items():
            assert_close(
                got[name],
                gradient,
                name,
                tolerance=1e-6 if isinstance(rule, fb.rules.BRSF) else 1e-11,
            )
        with torch.no_grad():
            model.get_submodule("head").weight[:, ::2].neg_()


# s of a layer by hand, from the code of Xiao et al. 2019
SCALES = [
    (nn.Linear(400, 10), 0.05),  # 1 / sqrt(400), whatever the width of the output
    (nn.Linear(400, 1000), 0.05),
    (nn.Linear(16, 4), 0.25),
    (nn.Conv2d(3, 8, 5), 0.1),  # sqrt(2 / (25 * 8)), whatever the number of input channels
    (nn.Conv2d(64, 8, 5), 0.1),
    (nn.Conv2d(4, 50, 2), 0.1),
    (nn.Conv1d(3, 50, 4), 0.1),
    (nn.Conv2d(3, 200, 1), 0.1),
]


@pytest.mark.parametrize("magnitude", ["uniform", "random"])
@pytest.mark.parametrize(("layer", "scale"), SCALES, ids=str)
def test_the_scale_of_sign_symmetry_is_that_of_its_authors(
    layer: nn.Module, scale: float, magnitude: str
) -> None:
    """The input is as large as the kernel, so one unit's error is sent back as its row of B."""
    channels, *kernel = layer.weight.shape[1:]
    first = nn.Conv2d if len(kernel) == 2 else nn.Conv1d
    below = first(2, channels, 1) if kernel else nn.Linear(2, channels)
    rule = fb.rules.SignSymmetry(magnitude=magnitude)
    model = nn.Sequential(below, nn.Tanh(), layer, nn.Flatten()).to(F64)
    learner = fb.attach(model, rule, example=torch.ones(2, 2, *kernel, dtype=F64))
    (edge,) = learner.graph.edges
    own = () if magnitude == "uniform" else (learner.feedback_of(edge),)
    units = torch.eye(len(layer.weight), dtype=F64).view(
        -1, len(layer.weight), *(1 for _ in kernel)
    )
    B = edge.operator.send((*own, layer.weight), units, (channels, *kernel)).detach()
    assert torch.equal(B.sign(), layer.weight.sign())
    if magnitude == "uniform":
        torch.testing.assert_close(B.abs(), torch.full_like(B, scale), rtol=1e-12, atol=0)
        return
    bound = scale * math.sqrt(3) if kernel else scale
    assert B.abs().max() <= bound * (1 + 1e-6)
    # U(0, b) has the mean b / 2 and the variance b**2 / 12: five standard errors
    assert abs(B.abs().mean() - bound / 2) < 5 * bound / math.sqrt(12 * B.numel())


@pytest.mark.parametrize("mode", ["fa", "usf", "frsf"])
@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_gradients_equal_those_of_biotorch(name: str, mode: str) -> None:
    """Numbers that another implementation computed; `reference/make_biotorch.py` tells how."""
    model, x, y = make_biotorch.nets()[name]
    fixed = make_biotorch.feedback(model)
    expected = json.loads(make_biotorch.FILE.read_text())[name][mode]
    learner = fb.attach(model, fb.RULES[mode](), example=x)
    for edge in learner.graph.edges:
        if mode != "usf":
            B = fixed[layer_of(edge)]
            learner.feedback_of(edge).copy_(B.abs() if mode == "frsf" else B)
    F.cross_entropy(learner(x), y).backward()
    assert len(expected) == len(list(model.parameters()))
    for key, p in model.named_parameters():
        assert_close(
            p.grad, torch.tensor(expected[key], dtype=F64).view(p.shape), key, tolerance=1e-8
        )
    differ = json.loads(make_biotorch.FILE.read_text())[name]["usf" if mode == "fa" else "fa"]
    assert any(differ[key] != expected[key] for key in expected)


def with_dropout() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(64, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3),
    ).to(F64)  # fmt: skip


X = torch.randn(6, 1, 8, 8, dtype=F64, generator=torch.Generator().manual_seed(1))
Y = torch.arange(6) % 3


@pytest.mark.parametrize("name", ["usf", "brsf", "frsf", "sign_symmetry"])
def test_outputs_and_random_state_are_those_of_the_plain_model(name: str) -> None:
    twin = with_dropout()
    torch.manual_seed(7)
    learner = fb.attach(with_dropout(), fb.RULES[name](), example=X)
    torch.manual_seed(7)
    for _ in range(3):
        state = torch.get_rng_state()
        expected = twin(X)
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        output = learner(X)
        assert torch.equal(output, expected)
        F.cross_entropy(output, Y).backward()
        assert torch.equal(torch.get_rng_state(), after)


def test_fresh_magnitudes_differ_in_every_pass_and_between_layers() -> None:
    learner = MLP.attach(fb.rules.BRSF())
    x, y = MLP.batch()
    first, second = step(learner, x, y), step(learner, x, y)
    for name in ("fc1.weight", "fc2.weight", "fc3.weight"):
        assert not torch.equal(first[name], second[name]), name
    assert torch.equal(first["head.weight"], second["head.weight"])
    states = [tuple(learner.feedback_of(edge).tolist()) for edge in learner.graph.edges]
    assert len({key for key, _ in states}) == 3
    assert [count for _, count in states] == [2, 2, 2]


def test_each_pass_sends_by_its_own_magnitudes() -> None:
    """Two forward passes before the first backward."""
    one, two = MLP.attach(fb.rules.BRSF()), MLP.attach(fb.rules.BRSF())
    x, y = MLP.batch()
    expected = [step(one, x, y), step(one, x, y)]
    losses = [loss_fn(y)(two(x)), loss_fn(y)(two(x))]
    for loss, there in zip(losses, expected, strict=True):
        two.zero_grad()
        loss.backward()
        for name, gradient in grads(two.model).items():
            assert_close(gradient, there[name], name, tolerance=0.0)


def test_fresh_magnitudes_go_on_after_loading() -> None:
    """In a learner of another seed, from the state alone; what was drawn globally does not matter (nor does a rank)."""
    x, y = MLP.batch()
    first, second = (
        MLP.attach(fb.rules.BRSF()),
        MLP.attach(fb.rules.BRSF(), MLP.model(seed=4), seed=5),
    )
    step(first, x, y)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    torch.manual_seed(11)
    a = step(first, x, y)
    torch.rand(3)
    b = step(second, x, y)
    for name, gradient in a.items():
        assert_close(b[name], gradient, name, tolerance=0.0)


def test_evaluations_and_probes_do_not_count_as_passes() -> None:
    learner = MLP.attach(fb.rules.BRSF())
    x, y = MLP.batch()
    fb.probe(learner, loss_fn(y), x, jacobian=True)
    with torch.no_grad():
        learner(x)
    with learner.exact():
        learner(x)
    assert [learner.feedback_of(edge)[1].item() for edge in learner.graph.edges] == [0, 0, 0]


@pytest.mark.single
@pytest.mark.parametrize("name", ["usf", "brsf", "frsf"])
def test_compiled_passes_are_the_plain_ones(name: str) -> None:
    torch._dynamo.reset()
    plain = MLP.attach(fb.RULES[name]())
    learner = copy.deepcopy(plain)
    compiled = torch.compile(learner, backend="aot_eager", fullgraph=True)
    x, y = MLP.batch()
    for _ in range(3):
        expected = step(plain, x, y)
        learner.zero_grad()
        loss_fn(y)(compiled(x)).backward()
        for key, gradient in grads(learner.model).items():
            assert_close(gradient, expected[key], key)
    for a, b in zip(learner.feedback.buffers(), plain.feedback.buffers(), strict=True):
        assert torch.equal(a, b)


def test_hashed_numbers_are_uniform_and_independent() -> None:
    """Moments to five standard errors; correlations of neighbours, passes and keys within five standard errors of none."""
    size = 200_000
    keys = [
        torch.tensor([key, count])
        for key, count in ((5, 0), (5, 1), (5, 2), (6, 0), (2**40 + 5, 0))
    ]
    drawn = [uniform(state, size).double() for state in keys]
    for u in drawn:
        assert u.min() >= 0
        assert u.max() < 1
        for power in (1, 2, 3):
            variance = 1 / (2 * power + 1) - 1 / (power + 1) ** 2
            assert abs(u.pow(power).mean() - 1 / (power + 1)) < 5 * math.sqrt(variance / size)
        counts = torch.histc(u, 64, 0, 1)
        assert ((counts - size / 64) ** 2 / (size / 64)).sum() < 63 + 5 * math.sqrt(2 * 63)
    pairs = [(drawn[0], other) for other in drawn[1:]] + [
        (drawn[0][:-k], drawn[0][k:]) for k in (1, 2, 16, 1024)
    ]
    for a, b in pairs:
        correlation = 12 * ((a - 0.5) * (b - 0.5)).mean()
        assert abs(correlation) < 5 / math.sqrt(len(a))


def test_a_weight_of_zero_feeds_nothing_back() -> None:
    model = MLP.model()
    nn.init.zeros_(model.get_submodule("head").weight)
    for rule in (fb.rules.USF(), fb.rules.FRSF(), fb.rules.BRSF(follow_norm=True)):
        learner = MLP.attach(rule, model)
        got = step(learner, *MLP.batch())
        assert got["fc3.weight"].abs().max() == 0
        assert got["head.weight"].abs().max() > 0
        learner.detach()


@pytest.mark.parametrize(
    "kind", [fb.rules.USF, fb.rules.FRSF, fb.rules.BRSF, fb.rules.SignSymmetry]
)
def test_zero_feedback_and_unknown_options_are_refused(kind: type[fb.Rule]) -> None:
    with pytest.raises(fb.AttachError, match="zero feedback"):
        kind(scale=0.0)
    wrong = {"magnitude": "fresh"} if kind is fb.rules.SignSymmetry else {"init": "cauchy"}
    with pytest.raises(fb.AttachError, match="choose one of"):
        MLP.attach(kind(**wrong))


def test_what_is_transported_and_stored() -> None:
    learner = MLP.attach(fb.rules.USF())
    assert learner.rule.transport == "signs"
    assert learner.feedback_bytes == 0
    assert "made from fc2.weight" in str(learner)
    assert MLP.attach(fb.rules.BRSF()).feedback_bytes == 3 * 16


def test_kept_norms_train() -> None:
    """W <- W |W_0| / |W| after every step: the norms stay, the weights move, and the loss falls."""
    model = with_dropout().eval()
    learner = fb.attach(model, fb.rules.USF(), example=X)
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.2, momentum=0.9, weight_decay=0.01)
    handle = fb.renormalize_weights(learner.model.parameters(), optimizer)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(learner(X), Y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for name, p in model.named_parameters():
        assert not torch.equal(p, start[name]), name
        if p.dim() > 1:
            torch.testing.assert_close(p.norm(), start[name].norm(), rtol=1e-12, atol=0)
    assert losses[-1] < 0.2 * losses[0]
    handle.remove()
    optimizer.step()
    assert abs(model[0].weight.norm() - start["0.weight"].norm()) > 1e-6
