"""Two processes under DistributedDataParallel: the gradients of one process with the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import zoo
from ranks import chosen
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import feedbackward as fb

WORLD, BATCH, STEPS = 2, 8, 3
RULES = {
    "dfa": fb.DFA(),
    "dkp": fb.DKP.published(),
    "brsf": fb.rules.BRSF(),
    "pfa": fb.rules.PFA(expand=2),
}
NETS = ("group_norms", "resnet_functional", "tokens")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo"),
]


def make(name: str, rule: fb.Rule) -> tuple[fb.Learner, Tensor]:
    """The learner, attached on any two samples, and the whole batch."""
    model, example = zoo.build(zoo.case(name))
    batch = torch.randn(
        BATCH, *example.shape[1:], generator=torch.Generator().manual_seed(5)
    ).double()
    return fb.attach(model.double(), rule, example=batch[:2]), batch


def train(call: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    """The gradients of the first step and the weights after the last."""
    optimizer = torch.optim.SGD(call.parameters(), lr=0.05, momentum=0.9)
    kept: dict[str, Tensor] = {}
    for _ in range(STEPS):
        optimizer.zero_grad()
        call(batch).square().mean().backward()
        kept = kept or {n: p.grad.clone() for n, p in call.named_parameters() if p.grad is not None}
        optimizer.step()
    weights = {f"after {n}": value for n, value in call.state_dict().items()}
    return {n.replace("module.", ""): value for n, value in (kept | weights).items()}


def worker(rank: int, folder: str, names: list[str], keys: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD
    )
    found: dict[str, Any] = {}
    for name in names:
        for key in keys:
            learner, batch = make(name, RULES[key])
            torch.manual_seed(100 + rank)  # ranks differ in everything but the seed given to attach
            part = batch.chunk(WORLD)[rank]
            found[f"{name} {key}"] = train(DistributedDataParallel(learner), part)
    found["frozen"] = frozen(rank)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def frozen(rank: int) -> dict[str, Any]:
    """Frozen leaves hidden parameters without a gradient, which DDP wants to know in advance."""
    learner, batch = make("group_norms", fb.Frozen())
    try:
        train(DistributedDataParallel(learner), batch.chunk(WORLD)[rank])
        refusal = ""
    except RuntimeError as error:
        refusal = str(error)
    learner, batch = make("group_norms", fb.Frozen())
    for name, p in learner.model.named_parameters():
        p.requires_grad_(name in learner.plan.head.parameters)
    return {
        "refusal": refusal,
        "grads": train(DistributedDataParallel(learner), batch.chunk(WORLD)[rank]),
    }


@pytest.fixture(scope="module")
def ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    wanted = (str(folder), chosen(request, "name"), chosen(request, "key"))
    mp.spawn(worker, args=wanted, nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("key", RULES)
@pytest.mark.parametrize("name", NETS)
def test_gradients_and_weights_are_those_of_the_whole_batch(
    ranks: list[dict[str, Any]], name: str, key: str
) -> None:
    """Feedback included, without find_unused_parameters; and feedback is the same on all ranks."""
    expected = train(*make(name, RULES[key]))
    first, second = (found[f"{name} {key}"] for found in ranks)
    assert first.keys() == second.keys() == expected.keys()
    assert any("feedback" in k for k in expected)
    for k, value in expected.items():
        torch.testing.assert_close(first[k], value, rtol=1e-10, atol=1e-12, msg=k)
        assert torch.equal(first[k], second[k]), k


def test_frozen_needs_its_hidden_layers_frozen(ranks: list[dict[str, Any]]) -> None:
    expected = train(*make("group_norms", fb.Frozen()))
    for found in ranks:
        assert "find_unused_parameters" in found["frozen"]["refusal"]
        for k, value in found["frozen"]["grads"].items():
            torch.testing.assert_close(value, expected[k], rtol=1e-10, atol=1e-12)
