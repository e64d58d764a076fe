"""Late gradients against hand-kept lists; what cannot be delayed is refused."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence

import pytest
import torch
from pairs import CONV, F64, MLP, Pair, exact_grads, grads, loss_fn
from torch import Tensor, nn

import feedbackward as fb
from feedbackward.errors import CheckpointError
from feedbackward.schedules.delayed import products

STEPS = 6


def gradients(learner: fb.Learner, pair: Pair, step: int) -> None:
    """What the rule gives on the batch of this step, without any schedule."""
    x, y = pair.batch(seed=step)
    if learner.attached.needs_target:
        learner.target(y)
    loss_fn(y)(learner(x)).backward()
    if learner.attached.in_phase:
        learner.feedback_step(x, loss_fn(y))


def trained(
    learner: fb.Learner,
    pair: Pair,
    stale: fb.Delayed | None,
    steps: int = STEPS,
    predict: bool = False,
) -> list[dict[str, Tensor | None]]:
    """Train by momentum; the gradients that each step's optimizer was given."""
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1, momentum=0.9)
    given = []
    for t in range(steps):
        optimizer.zero_grad()
        with stale.predicted() if stale and predict else contextlib.nullcontext():
            gradients(learner, pair, t)
        if stale is not None:
            stale.exchange()
        given.append(grads(learner))
        optimizer.step()
    return given


def by_hand(
    learner: fb.Learner, pair: Pair, delays: Sequence[int], parts: Sequence[set[str]]
) -> dict[str, Tensor]:
    """The same training with a list of all gradients there ever were."""
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1, momentum=0.9)
    history = []
    for t in range(STEPS):
        optimizer.zero_grad()
        gradients(learner, pair, t)
        history.append(grads(learner))
        for name, p in learner.named_parameters():
            (delay,) = {d for d, part in zip(delays, parts, strict=True) if name in part}
            p.grad = history[t - delay][name] if t >= delay else None
        optimizer.step()
    return weights(learner)


def weights(learner: fb.Learner) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in learner.named_parameters()}


MLP_PARTS = [
    {"model.fc1.weight", "model.fc1.bias", "feedback.act1", "feedback.act1:bias"},
    {"model.fc2.weight", "model.fc2.bias", "feedback.act2", "feedback.act2:bias"},
    {"model.fc3.weight", "model.fc3.bias", "feedback.act3", "feedback.act3:bias"},
    {"model.head.weight", "model.head.bias"},
]
RULES = [fb.BP(), fb.DFA(), fb.DKP.published(), fb.rules.DTP(top="decoder")]


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
@pytest.mark.parametrize("delays", [(0, 0, 0, 0), (1, 1, 1, 1), (4, 2, 1, 0)], ids=str)
def test_a_part_gets_what_so_many_steps_ago_gave(rule: fb.Rule, delays: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    first, second = MLP.attach(rule), MLP.attach(rule)
    torch.manual_seed(1)
    expected = by_hand(first, MLP, delays, MLP_PARTS)
    torch.manual_seed(1)
    trained(second, MLP, fb.Delayed(second, delays))
    for name, p in second.named_parameters():
        assert torch.equal(p, expected[name]), name


@pytest.mark.parametrize(
    "rule", [*RULES, fb.KolenPollack(), fb.DGL(), fb.rules.LRA()], ids=lambda r: r.name
)
def test_no_staleness_is_plain_training(rule: fb.Rule) -> None:
    torch.manual_seed(0)
    first, second = MLP.attach(rule), MLP.attach(rule)
    torch.manual_seed(1)
    expected = trained(first, MLP, None)
    torch.manual_seed(1)
    given = trained(second, MLP, fb.Delayed(second, 0))
    for a, b in zip(expected, given, strict=True):
        assert a.keys() == b.keys()
        for name, gradient in a.items():
            assert (gradient is None) == (b[name] is None), name
            assert gradient is None or torch.equal(gradient, b[name]), name


def test_before_the_first_gradient_arrives_nothing_moves() -> None:
    learner = MLP.attach(fb.DKP.published())
    before = weights(learner)
    stale = fb.Delayed(learner, 3)
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1, weight_decay=0.1)
    for t in range(3):
        optimizer.zero_grad()
        gradients(learner, MLP, t)
        stale.exchange()
        optimizer.step()
        assert all(p.grad is None for p in learner.parameters())
    assert all(torch.equal(p, before[name]) for name, p in learner.named_parameters())


def test_accumulated_batches_arrive_together() -> None:
    """Gradients that were zeroed in place, and those of two batches, stay what they were while they wait."""
    learner = MLP.attach(fb.DKP.published())
    stale = fb.Delayed(learner, 1)
    sums: list[dict[str, Tensor | None]] = []
    for t in range(0, 6, 2):
        gradients(learner, MLP, t)
        gradients(learner, MLP, t + 1)
        sums.append(grads(learner))
        stale.exchange()
        if t:
            for name, gradient in grads(learner).items():
                assert torch.equal(gradient, sums[-2][name]), name
        for p in learner.parameters():
            if p.grad is not None:
                p.grad.zero_()


def test_a_buffer_view_is_kept_by_value() -> None:
    """Gradients that are views of somebody's buffer (DDP's buckets) are written over by the next step."""
    learner = MLP.attach(fb.DFA())
    stale = fb.Delayed(learner, 1)
    p = learner.model.head.bias
    buffer = torch.ones(10, dtype=F64)
    p.grad = buffer[:3]
    stale.exchange()
    buffer.zero_()
    stale.exchange()
    assert torch.equal(p.grad, torch.ones(3, dtype=F64))


# --- which part a parameter belongs to ---------------------------------------------------------------------------


def test_parts_without_cuts_are_those_between_the_sites() -> None:
    """Backprop cuts nothing, yet has the parts that a direct rule on the same sites has."""
    for pair in (MLP, CONV):
        bp, dfa = pair.attach(fb.BP()), pair.attach(fb.DFA())
        assert bp.plan.stages == dfa.plan.stages
        assert [part.site for part in bp.plan.stages] == [*pair.cuts, "head"]


def test_parts_follow_the_forward_pass_and_not_the_definition() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.act, self.first = nn.Linear(5, 3), nn.ReLU(), nn.Linear(7, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.act(self.first(x)))

    learner = fb.attach(Backwards(), fb.rules.DSP(blocks=2), example=torch.randn(4, 7))
    assert [part.parameters for part in learner.plan.stages] == [
        ("first.weight", "first.bias"),
        ("head.weight", "head.bias"),
    ]
    assert fb.Delayed(learner).delays == (2, 0)


def test_feedback_that_shares_a_gradient_is_as_late_as_the_weight() -> None:
    """So Kolen-Pollack's W - B sees decay alone, as without staleness."""
    learner = MLP.attach(fb.KolenPollack())
    stale = fb.Delayed(learner, (3, 2, 1, 0))
    edges = learner.graph.edges
    before = [learner.model.get_parameter(e.shares) - learner.feedback_of(e) for e in edges]
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    for t in range(STEPS):
        optimizer.zero_grad()
        gradients(learner, MLP, t)
        stale.exchange()
        optimizer.step()
    for edge, difference in zip(edges, before, strict=True):
        after = learner.model.get_parameter(edge.shares) - learner.feedback_of(edge)
        assert torch.allclose(after, difference, atol=1e-12)


def test_auxiliary_networks_are_as_late_as_what_they_train() -> None:
    learner = MLP.attach(fb.DGL())
    given = trained(learner, MLP, fb.Delayed(learner, (2, 1, 0, 0)), steps=2)
    late = {name.split(".")[1] for name, gradient in given[1].items() if gradient is None}
    assert late == {"act1", "fc1"}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(7, 7), nn.Linear(7, 7), nn.Linear(7, 3)
        self.b.weight = self.a.weight
        self.act1, self.act2 = nn.Tanh(), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act2(self.b(self.act1(self.a(x)))))


def test_a_parameter_of_parts_of_different_staleness_is_refused() -> None:
    learner = fb.attach(Tied(), fb.DFA(), example=torch.randn(4, 7))
    with pytest.raises(fb.AttachError, match=r"a\.weight.*'act1' \(2 steps\).*'act2' \(1 steps\)"):
        fb.Delayed(learner, (2, 1, 0))
    assert fb.Delayed(learner, (1, 1, 0)).delays == (1, 1, 0)


def test_a_wrong_number_of_delays_is_refused() -> None:
    learner = MLP.attach(fb.DFA())
    for wrong in ((1, 0), (1, 1, -1, 0), -1):
        with pytest.raises(fb.AttachError, match="act1, act2, act3, head"):
            fb.Delayed(learner, wrong)


# --- an update that waits for a few products only --------------------------------------------------------------


def chain_net() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layers = [m for _ in range(7) for m in (nn.Linear(4, 4), nn.ReLU())]
    return nn.Sequential(*layers[:-1]), torch.randn(6, 4)


def test_parts_whose_signal_takes_more_products_get_it_late() -> None:
    model, x = chain_net()  # 7 layers: the signal of layer l takes 7 - l products
    learner = fb.attach(model, fb.KolenPollack(), example=x)
    assert products(learner) == (6, 5, 4, 3, 2, 1, 0)
    assert fb.Delayed(learner, steps=2).delays == (2, 2, 1, 1, 0, 0, 0)
    assert fb.Delayed(learner, steps=5).delays == (1, 0, 0, 0, 0, 0, 0)
    assert fb.Delayed(learner, steps=6).delays == (0,) * 7
    assert fb.Delayed(learner, 1, steps=3).delays == (2, 2, 2, 1, 1, 1, 1)
    with pytest.raises(fb.AttachError, match="steps must be >= 0"):
        fb.Delayed(learner, steps=-1)


def test_products_are_those_of_the_longest_way_down() -> None:
    model, x = chain_net()
    relayed = fb.attach(
        model, fb.rules.RelayedKP(steps=3), example=x
    )  # runs of two: 6, 5 | 4, 3 | 2, 1
    assert products(relayed) == (3, 3, 2, 2, 1, 1, 0)
    relayed.detach()
    star = fb.attach(model, fb.DFA(), example=x)
    assert products(star) == (1, 1, 1, 1, 1, 1, 0)
    star.detach()
    assert products(fb.attach(model, fb.BP(), example=x)) == (6, 5, 4, 3, 2, 1, 0)


def test_products_of_signals_that_go_upwards_are_not_counted_but_refused() -> None:
    model, x = chain_net()
    learner = fb.attach(model, fb.rules.IFA(), example=x)
    with pytest.raises(fb.AttachError, match=r"IFA.*upwards.*steps at 0"):
        fb.Delayed(learner, steps=2)
    fb.Delayed(learner, 1)


# --- DSP ---------------------------------------------------------------------------------------------------------


def test_dsp_is_backprop_with_older_gradients_further_down() -> None:
    assert fb.rules.DSP().delays(4) == (4, 4, 2, 0)
    assert fb.rules.DSP().delays(3) == (4, 2, 0)
    assert fb.rules.DSP(blocks=3, spacing=1).delays(6) == (2, 2, 1, 1, 0, 0)
    assert fb.rules.DSP(blocks=9).delays(2) == (2, 0)
    assert fb.rules.DSP(blocks=1).delays(5) == (0,) * 5
    learner = MLP.attach(fb.rules.DSP())
    twin = copy.deepcopy(learner.model)
    stale = fb.Delayed(learner)
    gradients(learner, MLP, 0)
    truth = exact_grads(twin, *MLP.batch(seed=0))
    for name, gradient in grads(learner.model).items():
        assert torch.equal(gradient, truth[name]), name
    stale.exchange()
    assert [p.grad is None for p in learner.model.parameters()] == [True] * 6 + [False] * 2


def test_dsp_without_its_schedule_is_refused() -> None:
    """It would be plain backprop, under another name."""
    learner = MLP.attach(fb.rules.DSP())
    x, y = MLP.batch()
    with pytest.raises(fb.FeedbackError, match=r"fb\.Delayed\(learner\)"):
        learner(x)
    with torch.no_grad():
        learner(x)
    with learner.exact():
        learner(x)
    delayed = fb.Delayed(learner)
    loss_fn(y)(learner(x)).backward()
    del delayed
    with pytest.warns(UserWarning, match=r"is gone, so DSP trains by plain backprop.*keep it"):
        learner(x)
    with pytest.raises(fb.AttachError, match=r"fb\.Delayed"):
        fb.Mixed({"act1": fb.rules.DSP(), "*": fb.DFA()})
    for wrong in ({"blocks": 0}, {"spacing": -1}):
        with pytest.raises(fb.AttachError, match="blocks >= 1"):
            fb.rules.DSP(**wrong)


# --- state -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("predict", [False, True])
def test_state_goes_on_exactly(predict: bool) -> None:
    learner = MLP.attach(fb.DKP.published())
    stale = fb.Delayed(learner, (3, 2, 1, 0))
    trained(learner, MLP, stale, steps=2, predict=predict)
    saved = copy.deepcopy({"stale": stale.state_dict(), "learner": learner.state_dict()})
    twin = MLP.attach(fb.DKP.published(), seed=9)
    twin.load_state_dict(saved["learner"])
    again = fb.Delayed(twin, (3, 2, 1, 0))
    again.load_state_dict(saved["stale"])
    given = (
        trained(*made, predict=predict) for made in ((learner, MLP, stale), (twin, MLP, again))
    )
    for a, b in zip(*given, strict=True):
        for name, gradient in a.items():
            assert (gradient is None) == (b[name] is None), name
            assert gradient is None or torch.equal(gradient, b[name]), name


def test_state_of_another_schedule_or_network_is_refused() -> None:
    learner = MLP.attach(fb.DKP.published())
    stale = fb.Delayed(learner, 1)
    with pytest.raises(CheckpointError, match="delays"):
        stale.load_state_dict(fb.Delayed(learner, 2).state_dict())
    state = fb.Delayed(MLP.attach(fb.DFA()), 1).state_dict()
    with pytest.raises(CheckpointError, match="parameters"):
        stale.load_state_dict(state)
    wrong = stale.state_dict()
    wrong["waiting"]["model.fc1.bias"] = [torch.zeros(2)]
    with pytest.raises(CheckpointError, match=r"model\.fc1\.bias"):
        stale.load_state_dict(wrong)
