"""Feedback that begins as what a layer's response to noise says of its weight."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from pairs import F64
from test_relays import attached, linear_net
from torch import nn

import feedbackward as fb
from feedbackward.operators import layer as layers
from feedbackward.operators.layer import LayerForm, LayerShaped

LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(40, 30), (40,)),
    (nn.Conv2d(6, 20, 3, padding=1), (6, 4, 4)),
    (nn.Conv2d(8, 20, 3, stride=2, padding=2, dilation=2, groups=2), (8, 9, 9)),
    (nn.Conv1d(8, 20, 3, padding=1, padding_mode="circular"), (8, 6)),
    (nn.ConvTranspose2d(12, 8, 3, stride=2), (12, 4, 4)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda value: type(value).__name__)
def test_feedback_that_begins_mirrored_is_near_the_weight(
    layer: nn.Module, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each round of the delta rule with as many samples as inputs halves the expected square of the error: 1/8 after three.

    (I - a S) of S = xi^T xi / M has the expected square 1 - 2a + a^2 (1 + n/M) = 1/2 for M = n, a = 1/2.
    """
    monkeypatch.setattr(layers, "MIRROR_ROUNDS", 3)
    torch.manual_seed(0)
    layer.to(F64)
    form = LayerForm.of(layer)
    x = torch.randn(1, *shape, dtype=F64)
    source = tuple(layer(x).shape[1:])
    left = []
    for seed in range(20):
        operator, generator = LayerShaped(form, "mirrored"), torch.Generator().manual_seed(seed)
        made = tuple(w.to(F64) for w in operator.create(source, shape, generator))
        W = layer.weight.detach()  # type: ignore[union-attr, operator]
        (B,) = operator.measure(made, W, source, shape, generator)
        left.append(((B - W).norm() / W.norm()).square().item())
    assert sum(left) / len(left) == pytest.approx(1 / 8, rel=0.35)


def test_another_init_is_left_as_it_was_made() -> None:
    operator, generator = (
        LayerShaped(LayerForm((3, 4)), "like_layer"),
        torch.Generator().manual_seed(0),
    )
    made = operator.create((3,), (4,), generator)
    assert operator.measure(made, torch.ones(3, 4), (3,), (4,), generator) is made


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_any_chain_can_begin_mirrored(dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 50), nn.ReLU(), nn.Linear(50, 40), nn.ReLU(), nn.Linear(40, 3)
    )
    learner = fb.attach(
        model, fb.KolenPollack(init="mirrored"), example=torch.randn(4, 5), feedback_dtype=dtype
    )
    for edge in learner.graph.edges:
        W, B = model.get_parameter(edge.shares), learner.feedback_of(edge)
        assert B.dtype == (dtype or torch.float32)
        assert torch.cosine_similarity(W.flatten(), B.flatten().float(), 0) > 0.85, edge.site.name


def test_feedback_begins_the_same_whatever_was_drawn_before() -> None:
    """So it is the same on every rank."""
    first = dict(attached(*linear_net()).feedback.named_parameters())
    model, x = linear_net()
    torch.manual_seed(5)
    second = attached(model, x).feedback
    assert all(torch.equal(B, first[name]) for name, B in second.named_parameters())


@pytest.mark.parametrize(
    "rule",
    [fb.rules.LRA, fb.rules.PFA, fb.rules.FRSF, fb.rules.BRSF, fb.rules.USF],
    ids=lambda rule: rule.name,
)
def test_other_feedback_cannot_begin_mirrored(rule: type[fb.Rule]) -> None:
    """It would be zero."""
    model, x = linear_net()
    with pytest.raises(
        fb.AttachError,
        match=r"init='mirrored' must have the form of a layer's weight.*Use another init",
    ):
        fb.attach(model, rule(init="mirrored"), example=x)  # type: ignore[call-arg]


CHAINS = [fb.FA, fb.rules.WeightMirror, fb.rules.InformationAlignment, fb.KolenPollack]


@pytest.mark.parametrize("rule", CHAINS, ids=lambda rule: rule.name)
@pytest.mark.parametrize("factor", [0.01, 1.0, 30.0])
def test_feedback_like_the_weight_takes_its_size_and_nothing_else(
    rule: type[fb.Rule], factor: float
) -> None:
    model, x = linear_net()
    before = fb.attach(model, rule(init="like_weight"), example=x).feedback.state_dict()  # type: ignore[call-arg]
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(-factor * weight.flip(0))
    learner = fb.attach(model, rule(init="like_weight"), example=x)  # type: ignore[call-arg]
    for edge in learner.graph.edges:
        B, W = learner.feedback_of(edge), model.get_parameter(edge.site.weight)
        torch.testing.assert_close(B, factor * before[edge.key])
        b = (
            B.abs().max() / 3**0.5
        )  # of a uniform law on [-b, b] the root mean square is b / sqrt(3)
        assert b.item() == pytest.approx(W.square().mean().sqrt().item(), rel=0.15)


def test_feedback_like_a_weight_of_zero_takes_the_size_of_the_usual_law() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    nn.init.zeros_(model[2].weight)
    learner = fb.attach(model, fb.FA(), example=torch.randn(4, 5))
    bound = learner.feedback_of(learner.graph.edges[0]).abs().max().item()
    assert bound == pytest.approx(8**-0.5, rel=0.15)


def test_feedback_like_the_weight_needs_its_values() -> None:
    with torch.device("meta"):
        model, x = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 5)
    learner = fb.attach(model, fb.FA(), example=x)
    with pytest.raises(fb.AttachError, match=r"init='like_weight'.*no values.*init='like_layer'"):
        learner.to_empty(device="cpu")


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


def warned(learner: fb.Learner) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            learner(torch.ones(5, 4)).sum().backward()
    return [str(w.message) for w in caught if "after the model was attached" in str(w.message)]


def test_weights_that_are_loaded_afterwards_are_told_once() -> None:
    for rule in (fb.KolenPollack(), fb.FA()):
        learner = fb.attach(net(), rule, example=torch.ones(5, 4))
        learner.model.load_state_dict(net().state_dict())
        (said,) = warned(learner)
        assert "'2.weight'" in said
    learner = fb.attach(net(), fb.KolenPollack(), example=torch.ones(5, 4))
    nn.init.orthogonal_(learner.model[4].weight)
    assert "'4.weight'" in warned(learner)[0]


@pytest.mark.parametrize("loaded", [False, True])
def test_a_copy_tells_what_was_loaded_and_nothing_else(loaded: bool) -> None:
    learner = fb.attach(net(), fb.KolenPollack(), example=torch.ones(5, 4))
    if loaded:
        learner.model.load_state_dict(net().state_dict())
    assert len(warned(copy.deepcopy(learner))) == loaded
    warned(learner)
    assert not warned(copy.deepcopy(learner))  # it was said, and nothing is compared any more


def test_weights_that_feedback_goes_with_are_not_told() -> None:
    x = torch.ones(5, 4)
    assert not warned(fb.attach(net(), fb.KolenPollack(), example=x))
    learner = fb.attach(net(), fb.KolenPollack(), example=x)
    learner.load_state_dict(fb.attach(net(), fb.KolenPollack(), example=x).state_dict())
    assert not warned(learner)
    for rule in (fb.KolenPollack(), fb.FA()):
        assert not warned(fb.attach(net(), rule, example=x).double().float())
    learner = fb.attach(net(), fb.KolenPollack.published(), example=x)
    learner.model.load_state_dict(net().state_dict())
    assert not warned(learner)


def test_an_estimate_has_the_precision_of_the_feedback() -> None:
    torch.manual_seed(0)
    model = net()
    plain = fb.attach(copy.deepcopy(model), fb.KolenPollack(), example=torch.ones(5, 4))
    with torch.autocast("cpu", torch.bfloat16):
        learner = fb.attach(model, fb.KolenPollack(), example=torch.ones(5, 4))
    for a, b in zip(learner.feedback.parameters(), plain.feedback.parameters(), strict=True):
        assert torch.equal(a, b)
