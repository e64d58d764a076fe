"""Lightning on two processes: each has half of every batch, and the weights are those of one that has it whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from client_nets import needed
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import feedbackward as fb

pytestmark = pytest.mark.clients
pl = needed("lightning.pytorch")

X = torch.randn(16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 3
RULES = {"dfa": fb.DFA(), "dkp": fb.DKP.published(), "kp": fb.KolenPollack()}


def attached(rule: fb.Rule, in_place: bool) -> fb.Learner:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)]
    return fb.attach(nn.Sequential(*layers).double(), rule, example=X, in_place=in_place)


class Module(pl.LightningModule):
    """Of a model in place, which Lightning saves, and whose feedback is beside it."""

    def __init__(self, rule: fb.Rule, in_place: bool) -> None:
        super().__init__()
        learner = attached(rule, in_place)
        self.net = learner.model if in_place else learner
        self.feedback = learner.feedback
        self.kept = [learner]

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        groups = fb.param_groups(self.kept[0], feedback={"lr": 0.02})
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def by_hand(rule: fb.Rule, in_place: bool, steps: int) -> dict[str, torch.Tensor]:
    module = Module(rule, in_place)
    optimizer = module.configure_optimizers()
    for _ in range(steps):
        optimizer.zero_grad()
        module.training_step((X, Y), 0).backward()
        optimizer.step()
    return dict(module.kept[0].named_parameters())


def fit(module: Any, epochs: int, resume: str | None = None) -> Any:
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=2, strategy="ddp", logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    # Lightning gives each process its share of the rows
    loader = DataLoader(TensorDataset(X, Y), batch_size=8)
    trainer.fit(module, loader, ckpt_path=resume)
    return trainer


def check(rule: fb.Rule, in_place: bool, folder: str) -> None:
    """One step each of three epochs, in two parts with a checkpoint between them."""
    half, resumed = Module(rule, in_place), Module(rule, in_place)
    file = f"{folder}/{rule.name}-{in_place}.ckpt"
    trainer = fit(half, 2)
    trainer.save_checkpoint(file)
    trainer.strategy.barrier()
    for p in resumed.parameters():
        p.data.normal_()
    trainer = fit(resumed, 3, file)
    assert trainer.world_size == 2
    for module, steps in ((half, 2), (resumed, 3)):
        expected = by_hand(rule, in_place, steps)
        for name, p in module.kept[0].named_parameters():
            torch.testing.assert_close(p, expected[name], rtol=1e-12, atol=1e-12)
            # on both ranks the same, to the last bit
            both = [torch.empty_like(p) for _ in range(2)]
            torch.distributed.all_gather(both, p.detach())
            assert torch.equal(*both), name
    start = dict(attached(rule, in_place).named_parameters())
    learned = [n for n, p in half.kept[0].named_parameters() if not torch.equal(p, start[n])]
    assert len(learned) == len(start), sorted(set(start) - set(learned))
    print(f"{rule.name}, rank {trainer.global_rank}: the same", flush=True)


@pytest.mark.nightly
def test_two_processes_are_one(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ran = subprocess.run(
        [*command, __file__, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert ran.returncode == 0, ran.stdout[-1000:] + ran.stderr[-3000:]
    # rules, learner or model in place, processes
    assert ran.stdout.count(": the same") == len(RULES) * 2 * 2, ran.stdout


if __name__ == "__main__":
    for one in RULES.values():
        for placed in (False, True):
            check(one, placed, sys.argv[1])
