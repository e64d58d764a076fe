"""What replay keeps: the part that is held, and the stand-ins of relays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pairs import F64
from test_schedules import Relayed, deep, outcome
from torch import Tensor, nn

import feedbackward as fb
from feedbackward.schedules import replay
from feedbackward.schedules.preparation import prepared


@pytest.mark.parametrize(
    ("widths", "places"),
    [([32] * 12, range(8, 11)), ([1024, 64, 32, 16, 8], range(1))],
    ids=["even", "tapering"],
)
def test_what_is_held_weighs_no_more_than_the_largest_segment(
    widths: list[int], places: range
) -> None:
    """Of equal segments only the top can be held; where the lowest outweighs the rest, all of the rest."""
    layers: list[nn.Module] = []
    for before, width in zip([8, *widths], widths, strict=False):
        layers += [nn.Linear(before, width), nn.Tanh()]
    learner = fb.attach(
        nn.Sequential(*layers, nn.Linear(widths[-1], 2)), fb.DFA(), example=torch.randn(3, 8)
    )
    assert prepared(learner.attached, torch.randn(64, 8)).hold in places


def test_stand_ins_of_relays_take_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every part is repeated, the lower relay's activity is known by its shape alone."""
    sizes = []

    def watched(cuts: Any, index: int, like: Tensor, *rest: Any) -> Tensor:
        sizes.append((tuple(like.shape), like.untyped_storage().nbytes()))
        return sent(cuts, index, like, *rest)

    sent = replay._sent
    monkeypatch.setattr(replay, "_sent", watched)
    batch = (torch.randn(5, 7, dtype=F64), torch.randint(3, (5,)))
    outcome(deep(), Relayed.published(relay=2), batch, "replay", hold=False)
    assert sizes == [((5, 6), 8)]


def test_a_preparation_is_of_what_trains() -> None:
    """It is made again for other trainable parameters, and known again when they come back."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(6, 8)
    attached = fb.attach(model, fb.DFA(), example=x).attached
    first = prepared(attached, x)
    model[0].requires_grad_(False)
    assert prepared(attached, x) is not first
    model[0].requires_grad_(True)
    assert prepared(attached, x) is first
