"""Two processes under FSDP, under DistributedDataParallel around a model in place, and by `learner.backward`.

Each gives the gradients of one process with the whole batch, or says that it cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import needs_gloo, run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import feedbackward as fb

pytestmark = needs_gloo
RULES = {
    "dfa": fb.DFA(),
    "dkp": fb.DKP.published(),
    "dgl": fb.DGL(hidden=0),
    "kp": fb.KolenPollack.published(),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.act(self.a(x)))


def attached(rule: str, **options: Any) -> fb.Learner:
    torch.manual_seed(0)
    blocks = [Block() for _ in range(2)]
    model = nn.Sequential(nn.Linear(6, 8), *blocks, nn.Sequential(nn.Linear(8, 8), nn.Tanh()))
    model.append(nn.Linear(8, 4))
    sites = "layers" if rule == "kp" else ["1", "2", "3"]
    return fb.attach(
        model.double(), RULES[rule], example=torch.randn(3, 6).double(), sites=sites, **options
    )


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 6, generator=generator).double(), torch.arange(8) % 4


def part(rank: int) -> tuple[Tensor, Tensor]:
    x, y = batch()
    return x.chunk(2)[rank], y.chunk(2)[rank]


def whole(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def trained(
    learner: fb.Learner, step: Callable[[Tensor, Tensor], Any], x: Tensor, y: Tensor
) -> Any:
    """The weights after three steps, the second of which accumulates two passes."""
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.05, momentum=0.9)
    for passes in (1, 2, 1):
        optimizer.zero_grad()
        for _ in range(passes):
            if learner.attached.needs_target:
                learner.target(y)
            step(x, y)
        optimizer.step()
    return {name: whole(p) for name, p in learner.named_parameters()}


def loss(output: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, y)


def one_process(rule: str) -> dict[str, Tensor]:
    learner = attached(rule)
    return trained(learner, lambda x, y: loss(learner(x), y).backward(), *batch())


def fsdp(learner: fb.Learner, modules: list[nn.Module], rank: int) -> Any:
    from torch.distributed.fsdp import fully_shard

    for module in modules:
        fully_shard(module)
    return trained(learner, lambda x, y: loss(learner(x), y).backward(), *part(rank))


def per_block(rank: int, rule: str) -> Any:
    learner = attached(rule)
    return fsdp(learner, [*learner.model[1:4], learner], rank)


def learner_left_out(rank: int, rule: str) -> Any:
    learner = attached(rule)
    return fsdp(learner, [learner.model], rank)


def at_the_root(rank: int, rule: str) -> Any:
    learner = attached(rule)
    return fsdp(learner, [learner], rank)


def sharded_before(rank: int, rule: str) -> Any:
    from torch.distributed.fsdp import fully_shard

    model = attached(rule).detach()
    fully_shard(model[1])
    fb.attach(model, RULES[rule], example=part(rank)[0], sites=["1", "2"])


def in_place(rank: int, rule: str) -> Any:
    learner = attached(rule, in_place=True)
    call = DistributedDataParallel(learner.model)
    return trained(learner, lambda x, y: loss(call(x), y).backward(), *part(rank))


def by_schedule(rank: int, schedule: str, reduce: bool | None) -> Any:
    learner = attached("dkp")

    def step(x: Tensor, y: Tensor) -> None:
        learner.backward(x, lambda out: loss(out, y), schedule, reduce=reduce)  # type: ignore[arg-type]

    return trained(learner, step, *part(rank))


def ways(rank: int) -> list[Any]:
    """All of them in one pair of processes, which take seconds to start."""
    cases = [
        *((per_block, rule) for rule in RULES),
        (learner_left_out, "dfa"),
        (learner_left_out, "dkp"),
        (at_the_root, "kp"),
        (sharded_before, "dfa"),
        *((in_place, rule) for rule in RULES),
        *((by_schedule, schedule, True) for schedule in ("joint", "replay")),
        (by_schedule, "joint", False),
        (by_schedule, "joint", None),
    ]
    found = []
    for work, *options in cases:
        try:
            found.append(work(rank, *options))
        except fb.FeedbackError as error:
            found.append(str(error))
    return [
        [f"{work.__name__} {' '.join(map(str, o))}", r]
        for (work, *o), r in zip(cases, found, strict=True)
    ]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    ranks = run_ranks(ways, 2, folder / "group")
    assert all(isinstance(r, list) for r in ranks), ranks
    return [dict(r) for r in ranks]


@pytest.mark.parametrize(
    "way",
    [
        *(f"per_block {rule}" for rule in ("dfa", "dkp", "dgl")),
        "learner_left_out dfa",
        "at_the_root kp",
        *(f"in_place {rule}" for rule in RULES),
        "by_schedule joint True",
        "by_schedule replay True",
    ],
)
def test_two_processes_are_one_with_the_whole_batch(found: list[dict[str, Any]], way: str) -> None:
    name, what = way.split()[:2]
    expected = one_process("dkp" if name == "by_schedule" else what)
    for rank in found:
        assert isinstance(rank[way], dict), rank[way]
        for key, value in expected.items():
            torch.testing.assert_close(rank[way][key], value, rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("per_block kp", "fully_shard"),
        ("learner_left_out dkp", "call `fully_shard(learner)` after"),
        ("sharded_before dfa", "'1' is sharded by FSDP already"),
        ("by_schedule joint None", "reduce=True"),
    ],
)
def test_what_would_be_wrong_is_refused(found: list[dict[str, Any]], way: str, words: str) -> None:
    for rank in found:
        assert words in rank[way]


def test_without_reduction_each_process_keeps_its_own(found: list[dict[str, Any]]) -> None:
    a, b = (rank["by_schedule joint False"] for rank in found)
    assert not torch.equal(a["model.0.weight"], b["model.0.weight"])
