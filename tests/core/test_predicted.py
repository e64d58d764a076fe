"""Late gradients that are taken at predicted weights, against the formula by hand."""

from __future__ import annotations

import contextlib

import torch
from pairs import MLP, grads
from test_staleness import MLP_PARTS, STEPS, gradients, weights

import feedbackward as fb


def test_late_gradients_are_taken_at_predicted_weights() -> None:
    """Against the formula by hand: W + k (W - W of the step before), for the late parts, feedback and all."""
    torch.manual_seed(0)
    first, second = MLP.attach(fb.DKP.published()), MLP.attach(fb.DKP.published())
    ages = {name: d for d, part in zip((3, 2, 1, 0), MLP_PARTS, strict=True) for name in part}
    optimizer, other = (
        torch.optim.SGD(x.parameters(), lr=0.1, momentum=0.9) for x in (first, second)
    )
    stale = fb.Delayed(second, (3, 2, 1, 0))
    past, history = [], []
    for t in range(STEPS + 2):
        now = weights(first)
        past.append(now)
        with torch.no_grad():
            for name, p in first.named_parameters():
                p.copy_(now[name] + ages[name] * (now[name] - past[max(t - 1, 0)][name]))
        optimizer.zero_grad()
        gradients(first, MLP, t)
        history.append(grads(first))
        with torch.no_grad():
            for name, p in first.named_parameters():
                p.copy_(now[name])
                p.grad = history[t - ages[name]][name] if t >= ages[name] else None
        optimizer.step()
        other.zero_grad()
        before = weights(second)
        with stale.predicted():
            gradients(second, MLP, t)
        assert all(torch.equal(p, before[name]) for name, p in second.named_parameters())
        stale.exchange()
        other.step()
    expected = weights(first)
    assert all(
        torch.allclose(p, expected[name], atol=1e-12) for name, p in second.named_parameters()
    )


def test_where_weights_move_evenly_late_gradients_are_in_time() -> None:
    """Prediction is exact then: on one batch, what arrives is the gradient of this very moment."""
    learner = MLP.attach(fb.BP())
    stale = fb.Delayed(learner, 2)
    torch.manual_seed(3)
    movement = {name: 0.01 * torch.randn_like(p) for name, p in learner.named_parameters()}
    for t in range(5):
        learner.zero_grad()
        gradients(learner, MLP, 0)
        present = grads(learner)
        learner.zero_grad()
        with stale.predicted():
            gradients(learner, MLP, 0)
        stale.exchange()
        if t > 2:  # the first that was predicted from a movement was taken in the second step
            for name, p in learner.named_parameters():
                assert torch.allclose(p.grad, present[name], atol=1e-12), name
        with torch.no_grad():
            for name, p in learner.named_parameters():
                p += movement[name]


def test_an_error_leaves_no_predicted_weights_behind() -> None:
    learner = MLP.attach(fb.DFA())
    stale = fb.Delayed(learner, 1)
    with stale.predicted():
        pass
    with torch.no_grad():
        for p in learner.parameters():
            p += 1
    before = weights(learner)
    with contextlib.suppress(KeyboardInterrupt), stale.predicted():
        assert not torch.equal(learner.model.fc1.weight, before["model.fc1.weight"])
        raise KeyboardInterrupt
    assert all(torch.equal(p, before[name]) for name, p in learner.named_parameters())


def test_a_state_from_before_any_prediction_leaves_no_movement() -> None:
    learner = MLP.attach(fb.DFA())
    fresh, stale = fb.Delayed(learner, 1).state_dict(), fb.Delayed(learner, 1)
    with stale.predicted():
        pass
    with torch.no_grad():
        for p in learner.parameters():
            p += 1
    stale.load_state_dict(fresh)
    before = weights(learner)
    with stale.predicted():
        assert all(torch.equal(p, before[name]) for name, p in learner.named_parameters())
