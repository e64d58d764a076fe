"""Feedback by its size: `operator="auto"`, operators and rules by name, and the memory it would take."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import feedbackward as fb
from feedbackward.engine import size


class Bottleneck(nn.Module):
    """As in ResNet-50: 1x1, 3x3, 1x1 convolutions beside a skip path."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.main = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        same = stride == 1 and inputs == out
        self.skip = nn.Identity() if same else nn.Conv2d(inputs, out, 1, stride, bias=False)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.main(x) + self.skip(x))


def resnet50() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for i in range(count):
            layers.append(Bottleneck(inputs, width, stride if i == 0 else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


@pytest.mark.filterwarnings("ignore:no segment")
def test_a_resnet_of_imagenets_size_needs_little() -> None:
    """By shapes alone, so nothing of 36 GB is made."""
    with torch.device("meta"):
        model, x = resnet50(), torch.randn(2, 3, 224, 224)
    learner = fb.attach(model, fb.DKP(), example=x)
    assert len(learner.sites) > 45
    assert learner.feedback_bytes < 0.5e9
    dense = sum(1000 * math.prod(site.shape) * 4 for site in learner.sites)
    assert dense > 30e9


def test_small_feedback_is_dense() -> None:
    auto = fb.operators.Auto("zeros")
    assert auto.fit((10,), (64, 32, 32), 0) == fb.Dense("zeros")
    assert auto.fit((1000,), (4096,), 0) == fb.Dense("zeros")
    assert auto.fit((4096,), (4096,), 0) == fb.Dense("zeros")
    assert auto.fit((1000,), (25088,), 0) == fb.LowRank(64, "zeros")
    assert auto.fit((1000,), (2048, 7, 7), 0) == fb.Pooled(init="zeros")
    # of tokens the first dimension is no channel
    assert auto.fit((1000,), (197, 768), 0) == fb.LowRank(64, "zeros")
    assert auto.fit((20,), (100_000, 2), 0) == fb.LowRank(20, "zeros")
    assert auto.fit((50257,), (768,), 0) == fb.LowRank(64, "zeros")
    with pytest.raises(fb.AttachError, match="only chooses"):
        auto.create((10,), (8,), torch.Generator())
    with pytest.raises(fb.AttachError, match="initialisation"):
        fb.operators.Auto("magic")


@pytest.mark.parametrize(
    ("units", "site"),
    [(100, (32, 32, 32)), (1000, (64, 112, 112)), (1000, (5, 7, 300)), (50, (16, 8, 30, 30))],
)
def test_patches_are_the_smallest_that_fit(units: int, site: tuple[int, ...]) -> None:
    limit, auto = 4 * 2**20, fb.operators.Auto()
    chosen = auto.fit((units,), site, 0)
    assert isinstance(chosen, fb.Pooled)
    assert chosen.size is not None
    assert auto.bytes((units,), site) <= limit < fb.Pooled(chosen.size - 1).bytes((units,), site)


@pytest.mark.parametrize("form", [fb.Dense(), fb.Pooled(), fb.Pooled(2), fb.LowRank(3)], ids=repr)
def test_the_gram_matrix_is_that_of_the_dense_matrix(
    form: fb.Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, site = (5,), (4, 3, 3)
    weights = form.create(source, site, torch.Generator().manual_seed(0))
    B = form.dense(weights, source, site)
    if not isinstance(form, fb.Dense):
        # it may be too large to make
        monkeypatch.setattr(type(form), "dense", lambda *given: pytest.fail("made"))
    with FlopCounterMode(display=False) as counter:
        gram = form.gram(weights, source, site)
    torch.testing.assert_close(gram, B @ B.t())
    # a multiply-add is two operations
    assert form.gram_macs(source, site) == counter.get_total_flops() / 2


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


X = torch.randn(5, 4)


def test_rules_and_operators_by_name() -> None:
    learner = fb.attach(net(), "dkp", example=X)
    assert learner.rule == fb.DKP()
    named = fb.attach(net(), fb.DFA(operator="sparse"), example=X)
    given = fb.attach(net(), fb.DFA(operator=fb.Sparse()), example=X)
    for a, b in zip(named.feedback.buffers(), given.feedback.buffers(), strict=True):
        assert torch.equal(a, b)
    mixed = fb.Mixed({"1": fb.DFA(operator="auto"), "*": fb.DKP()})
    nn.functional.cross_entropy(
        fb.attach(net(), mixed, example=X)(X), torch.arange(5) % 3
    ).backward()


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("dpk", "nearest names are .*dkp"),
        (fb.DFA(operator="dens"), "no operator 'dens'"),
        (fb.DFA(operator="per_shape"), "write operator=fb.PerShape"),
        (fb.DKP(operator="binary"), "cannot be learned"),
    ],
)
def test_wrong_names(rule: fb.Rule | str, words: str) -> None:
    with pytest.raises(fb.AttachError, match=words):
        fb.attach(net(), rule, example=X)


def test_feedback_that_would_not_fit_is_refused_before_any_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 3), nn.Flatten())
    model.extend([nn.Linear(8 * 28 * 28, 100)])
    x = torch.randn(2, 3, 32, 32)
    # the two sites have 100 x 28,800 and 100 x 6,272 weights of four bytes; patches of 2 x 2 leave 100 x 7,200 of the first
    needed = 4 * 100 * (32 * 30 * 30 + 8 * 28 * 28)
    monkeypatch.setattr(size, "free_bytes", lambda device: 2 * needed)
    assert fb.attach(model, fb.DFA(), example=x).feedback_bytes == needed
    monkeypatch.setattr(size, "free_bytes", lambda device: 2 * needed - 2)
    monkeypatch.setattr(fb.Dense, "create", lambda *given: pytest.fail("made"))
    with pytest.raises(fb.AttachError, match=r'14\.0 MB.*operator="auto" \(5\.4 MB\)'):
        fb.attach(model, fb.DFA(), example=x)


def test_the_advice_is_smaller_than_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("feedbackward.attaching.LARGE", 0)
    model = nn.Sequential(nn.Conv2d(1, 64, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.append(nn.Linear(64, 10))
    small, large = torch.randn(2, 1, 10, 10), torch.randn(2, 1, 100, 100)
    for x, rule, advised in (
        (small, fb.DKP(), False),
        (large, fb.DFA(), True),
        (large, fb.DKP(), False),
    ):
        with pytest.warns(UserWarning, match="the feedback weights take") as caught:
            fb.attach(model, rule, example=x, sites=["1"]).detach()
        assert ('operator="auto"' in str(caught[0].message)) == advised


def test_only_large_feedback_is_warned_of() -> None:
    x, names = torch.randn(2, 1, 160, 160), ["1"]
    for channels, warned in ((8, 0), (128, 1)):
        model = nn.Sequential(nn.Conv2d(1, channels, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        model.extend([nn.Flatten(), nn.Linear(channels, 10)])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            # [10, channels, 158, 158] of four bytes: 8 MB, and 128 MB
            fb.attach(model, fb.DFA(), example=x, sites=names)
        assert len(caught) == warned


def test_free_memory_is_known_here() -> None:
    free = size.free_bytes(torch.device("cpu"))
    assert free is None or 0 < free < 1 << 50
    assert size.free_bytes(torch.device("meta")) is None
