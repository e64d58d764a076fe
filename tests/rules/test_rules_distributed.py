"""Every rule under DistributedDataParallel on two processes: the same feedback on each, before and after it has learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ranks import chosen
from steps import give_gradients, staleness
from test_rules_everywhere import CASES, trained
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import feedbackward as fb

WORLD, STEPS = 2, 2

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo"),
]


def run(name: str, rank: int) -> dict[str, Any]:
    """The state of a rule's learner on this rank before and after some steps on the rank's own images."""
    case = next(c for c in CASES if c.name == ("resnet" if name == "highway_kp" else "plain"))
    model = case.model()
    x, y = (
        torch.randn(4 * WORLD, *case.shape, generator=torch.Generator().manual_seed(5)),
        torch.arange(4 * WORLD) % 3,
    )
    learner = fb.attach(model, fb.RULES[name](), example=x[:2])
    for key, p in model.named_parameters():
        p.requires_grad_(key in trained(learner))  # DDP waits for all others
    start = {key: value.clone() for key, value in learner.state_dict().items()}
    torch.manual_seed(100 + rank)  # ranks differ in everything but the seed given to attach
    # hidden layers of PEPITA get their gradients in its second pass
    unused = name == "pepita"
    call = DistributedDataParallel(learner, find_unused_parameters=unused)
    stale = staleness(learner)
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.05)
    for _ in range(STEPS):
        optimizer.zero_grad()
        give_gradients(learner, x.chunk(WORLD)[rank], y.chunk(WORLD)[rank], F.cross_entropy, call)
        if stale is not None:
            stale.exchange()
        optimizer.step()
    return {"start": start, "end": learner.state_dict()}


def worker(rank: int, folder: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD
    )
    found: dict[str, Any] = {}
    for name in names:
        try:
            found[name] = run(name, rank)
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}
        dist.barrier()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, args=(str(folder), chosen(request, "name")), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("name", fb.RULES)
def test_ranks_stay_the_same(ranks: list[dict[str, Any]], name: str) -> None:
    first, second = (found[name] for found in ranks)
    assert "error" not in first, first["error"]
    for when in ("start", "end"):
        for key, value in first[when].items():
            if "running_" in key:  # DDP takes the first rank's before every pass
                continue
            assert torch.equal(value, second[when][key]), f"{key} at the {when}"
    moved = {
        key.split(".")[0]
        for key, value in first["start"].items()
        if not torch.equal(value, first["end"][key])
    }
    assert moved >= ({"model", "feedback"} if fb.RULES[name]().learned else {"model"})
