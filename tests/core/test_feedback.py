"""Feedback weights: seeds, initialisations, and what they depend on."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from pairs import CONV, F64, MLP
from torch import Tensor, nn

import feedbackward as fb


def weights(learner: fb.Learner) -> dict[str, Tensor]:
    return {e.site.name: learner.feedback_of(e).detach() for e in learner.graph.edges}


def test_feedback_depends_on_seed_and_site_alone() -> None:
    """Not on the model's weights, the global generator, the dtype, the rule, or which other sites there are."""
    reference = weights(CONV.attach(fb.DFA(), seed=3))
    torch.manual_seed(99)
    torch.rand(5)
    others = [
        CONV.attach(fb.DKP.published(), CONV.model(seed=8), seed=3),
        CONV.attach(fb.DFA(), sites=["flat"], seed=3),
        CONV.attach(fb.DFA(), sites=["act3", "pool1", "flat"], seed=3),
        fb.attach(CONV.model().float(), fb.DFA(), example=CONV.batch()[0].float(), seed=3),
    ]
    for learner in others:
        for name, B in weights(learner).items():
            assert torch.equal(B.to(F64), reference[name]), name
    assert weights(others[-1])["flat"].dtype == torch.float32


@pytest.mark.parametrize("rule", [fb.DFA, fb.DKP])
def test_rules_pass_on_their_initialisation(rule: type[fb.DFA] | type[fb.DKP]) -> None:
    plain, scaled = (
        weights(MLP.attach(rule(operator=fb.Dense("scaled_normal")))),
        weights(MLP.attach(rule(operator=fb.Dense("scaled_normal", 2.0)))),
    )
    default = weights(MLP.attach(rule()))
    for name, B in plain.items():
        assert torch.equal(scaled[name], 2 * B)
        assert not torch.equal(default[name], B)


def test_feedback_differs_between_seeds_and_between_sites() -> None:
    one, two = weights(MLP.attach(fb.DFA(), seed=0)), weights(MLP.attach(fb.DFA(), seed=1))
    assert not any(torch.equal(one[name], two[name]) for name in one)
    assert one["act1"].shape == one["act3"].shape
    assert not torch.equal(one["act1"], one["act3"])


def test_feedback_is_the_same_in_every_process() -> None:
    """Ranks agree without talking: nothing depends on Python's randomised hashes."""
    code = (
        "import torch, feedbackward as fb; from torch import nn\n"
        "m = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))\n"
        "learner = fb.attach(m, fb.DFA(), example=torch.ones(2, 3), seed=6)\n"
        "print(learner.feedback_of(learner.graph.edges[0]).tolist())"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    learner = fb.attach(model, fb.DFA(), example=torch.ones(2, 3), seed=6)
    assert there.stdout.strip() == str(learner.feedback_of(learner.graph.edges[0]).tolist()), (
        there.stderr
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_feedback_is_the_same_on_every_device() -> None:
    x = CONV.batch()[0]
    here, there = (
        fb.attach(CONV.model(), fb.DFA(), example=x),
        fb.attach(CONV.model().cuda(), fb.DFA(), example=x.cuda()),
    )
    for name, B in weights(there).items():
        assert B.is_cuda
        assert torch.equal(B.cpu(), weights(here)[name])


def test_fixed_feedback_is_a_buffer_and_learned_feedback_a_parameter() -> None:
    fixed, learned = MLP.attach(fb.DFA()), MLP.attach(fb.DKP.published())
    assert [len(list(fixed.feedback.parameters())), len(list(fixed.feedback.buffers()))] == [0, 3]
    assert [len(list(learned.feedback.parameters())), len(list(learned.feedback.buffers()))] == [
        3,
        0,
    ]
    assert len(fb.param_groups(fixed)) == 1
    groups = fb.param_groups(learned, model={"lr": 1.0}, feedback={"lr": 2.0})
    assert [group["lr"] for group in groups] == [1.0, 2.0]
    assert {id(p) for group in groups for p in group["params"]} == {
        id(p) for p in learned.parameters()
    }
    assert learned.feedback_bytes == 8 * 3 * (6 + 5 + 6)


def create(init: str, site: tuple[int, ...], scale: float = 1.0, classes: int = 40) -> Tensor:
    (B,) = fb.Dense(init, scale).create((classes,), site, torch.Generator().manual_seed(0))
    return B


@pytest.mark.parametrize("site", [(2000,), (20, 10, 10)], ids=str)
@pytest.mark.parametrize(
    ("init", "bound", "std"),
    [
        ("kaiming_uniform", math.sqrt(6), math.sqrt(2)),
        ("scaled_uniform", 1.0, 1 / math.sqrt(3)),
        ("scaled_normal", None, 1.0),
    ],
)
def test_statistics_of_the_initialisations(
    init: str, bound: float | None, std: float, site: tuple[int, ...]
) -> None:
    """bound / sqrt(n) and std / sqrt(n), n all features of the site; 80,000 draws give the std to half a percent."""
    root = math.sqrt(math.prod(site))
    B = create(init, site)
    assert B.shape == (40, *site)
    assert B.dtype == torch.float32
    assert B.std().item() * root == pytest.approx(std, rel=0.015)
    assert abs(B.mean().item()) * root < 4 * std / math.sqrt(B.numel())
    if bound is not None:
        assert bound * 0.999 < B.abs().max().item() * root <= bound * (1 + 1e-6)
    assert torch.allclose(create(init, site, scale=2.5), 2.5 * B, rtol=1e-6)


def test_kaiming_uniform_is_torch_s_own_law() -> None:
    """torch.nn.init.kaiming_uniform_ on [C, c, H, W], as in the authors' code: fan_in is all but the first dimension."""
    reference = nn.init.kaiming_uniform_(torch.empty(40, 20, 10, 10))
    B = create("kaiming_uniform", (20, 10, 10))
    assert B.abs().max().item() == pytest.approx(reference.abs().max().item(), rel=1e-3)
    assert B.std().item() == pytest.approx(reference.std().item(), rel=0.02)


@pytest.mark.parametrize(
    ("init", "norm"), [("kaiming_uniform", 2.0), ("scaled_normal", 1.0), ("scaled_uniform", 1 / 3)]
)
@pytest.mark.parametrize("width", [500, 8000])
def test_signal_norm_does_not_depend_on_the_width(init: str, norm: float, width: int) -> None:
    """E |e B|^2 = |e|^2 n Var(B), Var(B) proportional to 1 / n."""
    e = torch.randn(30, 40, generator=torch.Generator().manual_seed(1))
    signal = fb.Dense(init).send((create(init, (width,)),), e, (width,))
    assert (signal.norm() / e.norm()).item() ** 2 == pytest.approx(norm, rel=0.05)


def test_zeros_are_zeros_and_wrong_choices_are_named() -> None:
    assert not create("zeros", (7,)).any()
    with pytest.raises(fb.AttachError, match=r"kaiming.*choose one of zeros, kaiming_uniform"):
        fb.Dense("kaiming")
    for dense in (fb.Dense("zeros"), fb.Dense(scale=0.0)):
        with pytest.raises(fb.AttachError, match="zero feedback"):
            fb.DFA(operator=dense)
