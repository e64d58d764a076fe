"""DKP and DFA against numbers that the DKP authors' own code computed on their own net."""

from __future__ import annotations

import json

import pytest
import torch
from pairs import loss_fn
from reference import make_dkp_gist

import feedbackward as fb
from feedbackward.experiment.nets import build, published_sites

RULES = {"DKP": fb.DKP.published(), "DFA": fb.DFA()}


@pytest.mark.parametrize("mode", make_dkp_gist.MODES)
def test_gradients_equal_those_of_the_authors(mode: str) -> None:
    """Of W and of B; `reference/make_dkp_gist.py` tells how the numbers were made."""
    model = build("small_cnn", (3, 32, 32), make_dkp_gist.CLASSES).double()
    x, y = make_dkp_gist.batch()
    make_dkp_gist.fill([model.get_parameter(name) for name in make_dkp_gist.THEIRS])
    learner = fb.attach(model, RULES[mode], example=x, sites=published_sites("small_cnn"))
    found = dict(model.named_parameters())
    for i, edge in enumerate(learner.graph.edges):
        B = learner.feedback_of(edge)
        with torch.no_grad():
            B.copy_(make_dkp_gist.feedback(i, tuple(B.shape)))
        if mode == "DKP":
            found[edge.site.name] = B
    loss_fn(y)(learner(x)).backward()
    expected = json.loads(make_dkp_gist.FILE.read_text())[mode]
    assert set(found) == set(expected)
    for name, p in found.items():
        *some, total = zip(make_dkp_gist.digest(p.grad), expected[name], strict=True)
        scale = max(abs(theirs) for _, theirs in some)
        assert scale > 0
        assert all(abs(ours - theirs) < 1e-10 * scale for ours, theirs in some), name
        assert abs(total[0] - total[1]) < 1e-9 * scale * p.numel() ** 0.5, name
