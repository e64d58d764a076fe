"""What goes wrong on one rank stops all ranks, soon, with an error that names it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from nets import RULES, Case
from ranks import Failure, needs_gloo, run_ranks
from torch.nn import functional as F

import feedbackward as fb
from feedbackward.errors import DivergenceError
from feedbackward.parallel.faults import Witnesses, lost

pytestmark = needs_gloo
TIMEOUT = 8.0


def train(rank: int, rule: str, what: str, where: int) -> Any:
    """Some steps, in the third of which something happens on rank `where`; how many were made."""
    case = Case("plain", RULES[rule], rows=(16,))
    x, y = case.batch(0)
    pipe = fb.parallel.pipeline(case.learner(), x, cut=["3", "5"], timeout=TIMEOUT)
    optimizer = case.optimizer(pipe)
    began = time.monotonic()
    for step in range(5):
        if step == 2 and rank == where:
            if what == "ends":
                return "ended"
            next(pipe.parameters()).register_hook(HAPPENS[what])
        before = {name: p.detach().clone() for name, p in pipe.named_parameters()}
        try:
            pipe.backward(x, F.cross_entropy, y)
        except fb.FeedbackError as error:
            same = all(torch.equal(p, before[name]) for name, p in pipe.named_parameters())
            lost = error.rank if isinstance(error, fb.parallel.LostRankError) else -1
            return {
                "step": step,
                "kind": type(error).__name__,
                "text": str(error),
                "lost": lost,
                "same": same,
                "seconds": time.monotonic() - began,
            }
        optimizer.step()
        optimizer.zero_grad()
    return "trained"


def kill(grad: torch.Tensor) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang(grad: torch.Tensor) -> None:
    time.sleep(2.5 * TIMEOUT)
    os._exit(1)


def be_slow(grad: torch.Tensor) -> None:
    time.sleep(TIMEOUT / 12)


def raise_error(grad: torch.Tensor) -> None:
    raise RuntimeError("out of memory")


HAPPENS = {"kill": kill, "hang": hang, "slow": be_slow, "raise": raise_error}


@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize(("rule", "what"), [("dkp", "kill"), ("bp", "kill"), ("dkp", "raise")])
def test_lost_rank_is_named(tmp_path: Path, rule: str, what: str, where: int) -> None:
    found = run_ranks(train, 3, tmp_path, rule, what, where)
    for rank, result in enumerate(found):
        if rank == where:
            assert result is None or isinstance(result, Failure)
            continue
        assert result["kind"] == "LostRankError", result
        assert result["lost"] == where, result
        assert f"rank {where}" in result["text"]
        assert "checkpoint" in result["text"]


@pytest.mark.nightly
def test_hanging_rank_is_named(tmp_path: Path) -> None:
    found = run_ranks(train, 3, tmp_path, "dkp", "hang", 1)
    for rank in (0, 2):
        assert found[rank]["kind"] == "LostRankError", found[rank]
        assert found[rank]["lost"] == 1, found[rank]


@pytest.mark.nightly
def test_slow_rank_is_waited_for(tmp_path: Path) -> None:
    assert run_ranks(train, 3, tmp_path, "dkp", "slow", 1) == ["trained"] * 3


def test_rank_without_data(tmp_path: Path) -> None:
    found = run_ranks(train, 3, tmp_path, "dkp", "ends", 2)
    assert found[2] == "ended"
    assert {found[0]["lost"], found[1]["lost"]} == {2}


def not_finite(rank: int, rule: str, where: int) -> Any:
    """Steps in the third of which a weight of one rank is NaN."""
    case = Case("plain", RULES[rule], rows=(16,))
    x, y = case.batch(0)
    pipe = fb.parallel.pipeline(case.learner(), x, cut=["3", "5"], timeout=60)
    optimizer = case.optimizer(pipe)
    for step in range(6):
        if step == 2 and rank == where:
            with torch.no_grad():
                next(pipe.parameters()).fill_(float("nan"))
        try:
            pipe.backward(x, F.cross_entropy, y)
        except fb.FeedbackError as error:
            return [step, type(error).__name__, str(error)]
        optimizer.step()
        optimizer.zero_grad()
    return "trained"


@pytest.mark.parametrize("where", [0, 2])
@pytest.mark.parametrize("rule", ["dkp", "bp", "dgl"])
def test_not_finite_stops_all(tmp_path: Path, rule: str, where: int) -> None:
    found = run_ranks(not_finite, 3, tmp_path, rule, where)
    for step, kind, text in found:
        assert kind == "DivergenceError", text
        assert "not finite" in text
        # local losses: the ranks are told with the loss of the step, when the next one ends
        assert step in ((2, 3) if rule == "dgl" else (2,)), text


def test_a_rank_that_stopped_at_a_number_is_not_lost() -> None:
    """Whoever only sees that its connection is closed learns why, and all raise the same."""
    store = dist.HashStore()
    ranks = [Witnesses(rank, 1, "") for rank in range(2)]
    for one in ranks:
        one.store, one.ranks = store, 2
    with pytest.raises(DivergenceError, match="step 2"), ranks[0].watching():
        raise DivergenceError("step 2: the loss is not finite")
    with (
        pytest.raises(DivergenceError, match="step 2: the loss is not finite"),
        ranks[1].watching(),
    ):
        raise lost(0, "header of step 3", RuntimeError("Connection closed by peer"))


def differ(rank: int, what: str) -> Any:
    """Ranks that are not given the same."""
    other = rank == 1
    torch.manual_seed(5 if other and what == "weights" else 0)
    case = Case("plain", RULES["dkp"])
    x, y = case.batch(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8), torch.nn.ReLU(),
        torch.nn.Linear(8, 4 if other and what == "model" else 3),
    ).double()  # fmt: skip
    rule = fb.DKP(strength=0.1 if other and what == "rule" else 0.2)
    seed = 1 if other and what == "rule with seed" else 0
    learner = fb.attach(model, rule, example=x, seed=seed)
    if other and what == "feedback":
        with torch.no_grad():
            next(learner.feedback.parameters()).add_(1e-9)
    parts = 2 if other and what == "options" else 4
    pipe = fb.parallel.pipeline(learner, x, micro_batches=parts, timeout=60)
    rows = 12 if other and what == "batches" else 16
    pipe.backward(x[:rows], F.cross_entropy, y[:rows])
    return "trained"


WHAT = ("weights", "model", "rule", "rule with seed", "feedback", "options", "batches")


@pytest.mark.parametrize("what", WHAT)
def test_ranks_that_differ_are_refused(tmp_path: Path, what: str) -> None:
    found = run_ranks(differ, 2, tmp_path, what)
    told = [result for result in found if isinstance(result, Failure)]
    word = {"rule with seed": "rule"}.get(what, what)
    assert any(word in failure.text and "rank" in failure.text for failure in told), found
    if what != "batches":
        assert [failure.kind for failure in told] == ["AttachError"] * 2


def refusals(rank: int) -> Any:
    """Divisions that cannot be."""
    found = {}
    case = Case("residual", RULES["dkp"], sites="blocks")
    tied = Case("plain", RULES["bp"]).learner().model
    tied[6].weight = tied[2].weight
    x = case.batch(0)[0]
    tries: dict[str, Any] = {
        "inside": lambda: pipe(case.learner(), cut=["1.norm", "4"]),
        "tied": lambda: pipe(fb.attach(tied, fb.BP(), example=x), cut=["3", "5"]),
        "few": lambda: pipe(Case("plain", RULES["dkp"], sites=["1"]).learner()),
        "names": lambda: pipe(Case("plain", RULES["dkp"]).learner(), cut=["1"]),
        "phase": lambda: pipe(Case("plain", fb.rules.WeightMirror()).learner()),
        "highway": lambda: pipe(Case("residual", fb.rules.HighwayKP()).learner()),
        "unknown": lambda: pipe(Case("plain", RULES["dkp"]).learner(), cut=["nine", "1"]),
    }

    def pipe(learner: fb.Learner, **options: Any) -> None:
        fb.parallel.pipeline(learner, x, timeout=60, **options)

    for name, attempt in tries.items():
        try:
            attempt()
            found[name] = "made"
        except fb.FeedbackError as error:
            found[name] = str(error)
    return found


def test_divisions_that_cannot_be(tmp_path: Path) -> None:
    expected = {
        "inside": ("1.norm", "another path"),
        "tied": ("2.weight", "6.weight", "tied"),
        "few": ("3 ranks need 2 places", "fewer ranks"),
        "names": ("3 ranks need 2 names",),
        "phase": ("Weight mirror", "phase of its own"),
        "highway": ("Highway KP", "skip paths"),
        "unknown": ("nine",),
    }
    for found in run_ranks(refusals, 3, tmp_path):
        for name, words in expected.items():
            for word in words:
                assert word in found[name], (name, found[name])
