"""What waits for what, without a clock; the bytes that travel; training and evaluation in turn."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import RULES, Case
from ranks import needs_gloo, run_ranks
from torch import nn
from torch.nn import functional as F

import feedbackward as fb

pytestmark = needs_gloo


def awaited(path: Path, seconds: float) -> bool:
    """Whether the file is there within so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not path.exists():
        time.sleep(0.02)
    return path.exists()


def held(rank: int, folder: Path, rule: str, seconds: float) -> Any:
    """Rank 1 holds its first backward after its last forward until rank 0 has ended its own and begun
    the next step; it returns whether it saw both."""
    case = Case("plain", RULES[rule], rows=(8,), micro_batches=4)
    x, y = case.batch(0)
    pipe = fb.parallel.pipeline(case.learner(), x, micro_batches=4, timeout=120)
    seen: list[bool] = []
    if rank == 1:
        forwards: list[int] = []
        pipe.module.model[-1].register_forward_hook(lambda *call: forwards.append(1))

        def hold(p: torch.Tensor) -> None:
            # where this rank waited for its inputs it has run a backward before: then errors were due
            if len(forwards) == 4 and not seen:
                seen.append(awaited(folder / "ended", seconds))
                seen.append(awaited(folder / "next", seconds))

        next(pipe.parameters()).register_post_accumulate_grad_hook(hold)
    optimizer = case.optimizer(pipe)
    for step in range(3):
        if rank == 0 and step == 1:
            (folder / "ended").touch()
            first = pipe.module.model.get_submodule("0")
            first.register_forward_hook(lambda *call: (folder / "next").touch())
        pipe.backward(x, F.cross_entropy, y)
        optimizer.step()
        optimizer.zero_grad()
    return {"seen": seen, "state": pipe.gather_state()}


@pytest.mark.parametrize(("rule", "unlocked"), [("dkp", True), ("drtp", True), ("bp", False)])
def test_backward_is_unlocked(tmp_path: Path, rule: str, unlocked: bool) -> None:
    """With direct feedback rank 0 ends its step, updates and begins the next one while rank 1 has
    not ended one backward; with backprop it cannot. The weights are those of one process."""
    first, second = run_ranks(held, 2, tmp_path, tmp_path, rule, 60.0 if unlocked else 2.0)
    assert second["seen"] == [unlocked, unlocked]
    expected = Case("plain", RULES[rule], rows=(8,)).naive_repeated(3)
    for key, value in expected.items():
        assert torch.allclose(first["state"][key], value, rtol=1e-12, atol=1e-14), key


def filled(rank: int, folder: Path, rule: str) -> Any:
    """Rank 0 holds the forward pass of its second micro-batch until rank 1 has run a backward pass."""
    case = Case("plain", RULES[rule], rows=(8,), micro_batches=4)
    x, y = case.batch(0)
    pipe = fb.parallel.pipeline(case.learner(), x, micro_batches=4, timeout=120)
    calls: list[bool] = []

    def hold(*call: Any) -> None:
        if len(calls) == 1:
            calls.append(awaited(folder / "backward", 60.0))
        else:
            calls.append(True)

    if rank == 0:
        pipe.module.model.get_submodule("0").register_forward_hook(hold)
    else:
        parameter = next(pipe.parameters())
        parameter.register_post_accumulate_grad_hook(lambda p: (folder / "backward").touch())
    optimizer = case.optimizer(pipe)
    for _ in range(2):
        pipe.backward(x, F.cross_entropy, y)
        optimizer.step()
        optimizer.zero_grad()
    return {"held": all(calls), "state": pipe.gather_state()}


@pytest.mark.parametrize("rule", ["dkp", "drtp"])
def test_waits_are_filled(tmp_path: Path, rule: str) -> None:
    """A rank that waits for an input runs the backward passes that are due; the weights are the same."""
    first, _ = run_ranks(filled, 2, tmp_path, tmp_path, rule)
    assert first["held"]
    for key, value in Case("plain", RULES[rule], rows=(8,)).naive_repeated(2).items():
        assert torch.allclose(first["state"][key], value, rtol=1e-12, atol=1e-14), key


def counted(rank: int) -> Any:
    """Bytes of a step that this rank received, by kind, for every rule."""
    found = {}
    rules = {name: RULES[name] for name in ("dkp", "drtp", "dgl", "bp", "kp")}
    rules["segmented"] = fb.SegmentedKP(steps=1)  # a segment ends at each cut
    for name, rule in rules.items():
        pipe, _ = Case("plain", rule, rows=(14,)).piped(3, cut=["3", "5"], timeout=120)
        found[name] = {"all": dict(pipe.mail.received), "backward": pipe.bytes_in_backward}
    return found


def test_bytes_on_the_wire(tmp_path: Path) -> None:
    """Direct feedback sends N x C numbers to each rank; chains a gradient of the activity's size."""
    ranks = run_ranks(counted, 3, tmp_path)
    steps, rows, classes, features, size = 3, 14, 3, 9, 8
    error, activity = steps * rows * classes * size, steps * rows * features * size
    for rank, found in enumerate(ranks):
        below_last = rank < 2
        for direct in ("dkp", "segmented"):
            assert found[direct]["backward"] == (error if below_last else 0)
        assert found["drtp"]["backward"] == found["dgl"]["backward"] == 0
        for chain in ("bp", "kp"):
            assert found[chain]["backward"] == (activity if below_last else 0)
        for name in found:
            assert found[name]["all"].get("activation", 0) == (activity if rank else 0)


def switched(rank: int) -> Any:
    """Losses and outputs of training and evaluation in turn, with batches of several sizes."""
    case = Case("mlp", RULES["dkp"])
    x, _ = case.batch(0)
    pipe = fb.parallel.pipeline(case.learner(), x, timeout=120)
    optimizer = case.optimizer(pipe)
    outputs = [pipe.evaluate(x)]
    for step in range(4):
        xs, ys = case.batch(step)
        pipe.backward(xs, F.cross_entropy, ys)
        optimizer.step()
        optimizer.zero_grad()
        outputs.append(pipe.evaluate(x[: 5 + step]))
    assert pipe.module.training
    return {"outputs": outputs, "state": pipe.gather_state()}


def test_training_and_evaluation_in_turn(tmp_path: Path) -> None:
    alone = switched(0)
    for found in run_ranks(switched, 3, tmp_path):
        for one, other in zip(alone["outputs"], found["outputs"], strict=True):
            assert torch.allclose(one, other, rtol=1e-12, atol=1e-14)
        for key, value in (found["state"] or {}).items():
            assert torch.allclose(value, alone["state"][key], rtol=1e-12, atol=1e-14), key


def named(rank: int) -> Any:
    """A cut named after a block, whose output is that of its last layer, at which the rule cuts; and one named after an
    activity that it does not cut."""
    found = {}
    for cut in ("1", "1.0"):
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4)]
        model = nn.Sequential(*blocks, nn.Linear(6, 3)).double()
        x = torch.randn(8, 6, dtype=torch.float64)
        learner = fb.attach(model, fb.DKP(), example=x, sites="layers")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            pipe = fb.parallel.pipeline(learner, x, cut=cut, timeout=120)
        pipe.backward(x, F.cross_entropy, torch.arange(8) % 3)
        found[cut] = (
            pipe.bytes_in_backward,
            [str(t.message) for t in told if t.category is RuntimeWarning],
        )
    return found


def test_a_cut_is_one_of_the_rule_by_any_name(tmp_path: Path) -> None:
    found, _ = run_ranks(named, 2, tmp_path)
    assert found["1"] == (8 * 3 * 8, [])
    received, told = found["1.0"]
    # the error, and the gradient of the activity
    assert received == 8 * 3 * 8 + 8 * 6 * 8
    assert len(told) == 1
    assert "does not cut the activity at '1.0'" in told[0]
