"""What a feedback graph must be, and who may run its passes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import feedbackward as fb

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def test_the_graph_contract() -> None:
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Nothing(fb.DFA):
        def graph(self, sites, source):
            return fb.Graph()

    @dataclass(frozen=True)
    class Twice(fb.DFA):
        def graph(self, sites, source):
            return fb.Graph(
                tuple(sites), tuple(fb.Edge(source, s, fb.Dense()) for s in sites for _ in range(2))
            )

    @dataclass(frozen=True)
    class Unarced(fb.FA):
        feeds = fb.Site

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    for rule, sentence in (
        (Nothing(), "plain backprop"),
        (Twice(), "key of its own"),
        (Unarced(), "feeds = LayerInput"),
    ):
        with pytest.raises(fb.AttachError, match=sentence):
            fb.attach(model, rule, example=X)


def test_one_pass_at_a_time() -> None:
    learner = fb.attach(
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)), fb.DFA(), example=X
    )
    learner.attached.cuts.tape = object()
    with pytest.raises(fb.SiteError, match="another thread"):
        learner(X)
    with pytest.raises(fb.AttachError, match="DistributedDataParallel"):
        learner._replicate_for_data_parallel()
