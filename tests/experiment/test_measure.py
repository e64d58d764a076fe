"""Measuring a step: bytes of the tensors that are alive, and time."""

import torch
from test_train import CPU

from feedbackward.experiment.training.measure import LiveBytes, step_times


def test_live_bytes_are_counted_from_birth_to_death():
    kept = torch.zeros(1000)
    with LiveBytes([kept]) as live:
        made = torch.zeros(1000)
        view = made.view(10, 100)
        del made
        assert (live.now, live.peak) == (8000, 8000)
        other = kept + 1
        assert live.peak == 12000
        del view, other
        assert (live.now, live.peak) == (4000, 12000)


def test_the_peak_holds_the_activations_of_a_backward_pass():
    x = torch.randn(100, 50, requires_grad=True)
    with LiveBytes([x]) as live:
        h = x
        for _ in range(6):
            h = torch.tanh(h)  # keeps its output for the backward pass
        h.sum().backward()
    assert live.peak >= (1 + 6) * 100 * 50 * 4


def test_steps_are_timed_in_turn():
    calls = []
    steps = [lambda: calls.append(0), lambda: calls.append(1), lambda: calls.append(2)]
    assert len(step_times(steps, 3, CPU)) == 3
    assert calls[9:] == [0, 1, 2, 1, 2, 0, 2, 0, 1]
