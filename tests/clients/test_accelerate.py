"""accelerate: a learner is prepared, accumulated, clipped and saved as any module is; on two processes too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from client_nets import needed
from torch import nn
from torch.nn import functional as F

import feedbackward as fb

pytestmark = pytest.mark.clients
accelerate = needed("accelerate")

X = torch.randn(16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 3
RULES = {"dfa": fb.DFA(), "dkp": fb.DKP.published(), "kp": fb.KolenPollack(), "drtp": fb.DRTP()}


def attached(rule: fb.Rule, in_place: bool = False) -> fb.Learner:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)]
    return fb.attach(nn.Sequential(*layers).double(), rule, example=X, in_place=in_place)


def by_hand(rule: fb.Rule) -> dict[str, torch.Tensor]:
    learner = attached(rule)
    optimizer = torch.optim.SGD(fb.param_groups(learner), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        learner.target(Y)
        F.cross_entropy(learner(X), Y).backward()
        optimizer.step()
    return dict(learner.named_parameters())


def train(rule: fb.Rule, in_place: bool, parts: int) -> fb.Learner:
    """Two steps; each process has its share of the rows, in `parts` batches that are accumulated."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=parts)
    learner = attached(rule, in_place)
    optimizer = torch.optim.SGD(fb.param_groups(learner), lr=0.1)
    whole = learner.model if in_place else learner
    model, optimizer = accelerator.prepare(whole, optimizer)
    rank, count = accelerator.process_index, accelerator.num_processes
    for _ in range(2):
        for rows in torch.arange(16)[rank::count].chunk(parts):
            with accelerator.accumulate(model):
                learner.target(Y[rows], 1 / parts)
                accelerator.backward(F.cross_entropy(model(X[rows]), Y[rows]))
                optimizer.step()
                optimizer.zero_grad()
    return learner


def assert_same(learner: fb.Learner, expected: dict[str, torch.Tensor]) -> None:
    for name, p in learner.named_parameters():
        torch.testing.assert_close(p, expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("in_place", [False, True], ids=["learner", "in_place"])
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("parts", [1, 4])
def test_steps_are_those_of_a_loop_by_hand(name: str, in_place: bool, parts: int) -> None:
    assert_same(train(RULES[name], in_place, parts), by_hand(RULES[name]))


def test_a_saved_state_is_read_again(tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    learner = attached(RULES["dkp"])
    optimizer = torch.optim.SGD(fb.param_groups(learner), lr=0.1)
    model, optimizer = accelerator.prepare(learner, optimizer)
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    accelerator.save_state(str(tmp_path))
    for p in learner.parameters():
        p.data.normal_()
    accelerator.load_state(str(tmp_path))
    for name, value in learner.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert accelerator.unwrap_model(model) is learner


def test_two_processes_are_one() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [*command, __file__], env=environment, capture_output=True, text=True, timeout=500
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    # rules, learner or model in place, processes
    assert ran.stdout.count("of 2 processes: the same") == len(RULES) * 2 * 2, ran.stdout


if __name__ == "__main__":
    for rule in RULES.values():
        for in_place in (False, True):
            assert_same(train(rule, in_place, 2), by_hand(rule))
            state = accelerate.PartialState()
            print(
                f"{rule.name}, {state.process_index} of {state.num_processes} processes: the same"
            )
