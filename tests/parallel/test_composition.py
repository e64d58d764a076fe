"""Pipelines together with what else PyTorch has: replicas, accumulation, bf16, checkpointing,
compiled blocks, distributed checkpoints."""

from __future__ import annotations

import copy
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from nets import RULES, Case
from ranks import needs_gloo, run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import feedbackward as fb

pytestmark = needs_gloo


def close(found: dict[str, Tensor], expected: dict[str, Tensor], within: float = 1e-12) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        worst = (found[key].double() - value.double()).abs().max().item()
        assert worst <= within * max(1.0, value.double().abs().max().item()), (key, worst)


def replicated(rank: int, rule: str) -> Any:
    """Two pipelines of two ranks, each with half of every batch."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "pipeline"))
    case = Case("plain", RULES[rule], rows=(16,), micro_batches=2)
    x, y = case.batch(0)
    pipe = fb.parallel.pipeline(case.learner(), x, micro_batches=2, mesh=mesh, timeout=120)
    optimizer = case.optimizer(pipe)
    half = slice(8 * (rank // 2), 8 * (rank // 2) + 8)
    for _ in range(3):
        pipe.backward(x[half], F.cross_entropy, y[half])
        optimizer.step()
        optimizer.zero_grad()
    return pipe.gather_state()


@pytest.mark.nightly
def test_pipelines_side_by_side(tmp_path: Path) -> None:
    """Four micro-batches of four rows: two in each pipeline, or four in one process."""
    for number, rule in enumerate(("dfa", "dkp", "bp")):
        found = run_ranks(replicated, 4, tmp_path / str(number), rule)
        expected = Case("plain", RULES[rule], rows=(16,), micro_batches=4).naive_repeated(3)
        close(found[0], expected)
        close(found[2], expected)


def sharded(rank: int, rule: str, reshard: bool) -> Any:
    """As `replicated`, with the layers of each stage sharded over the replicas."""
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "pipeline"))
    learner, x, y = halves(rule)
    pipe = fb.parallel.pipeline(learner, x, micro_batches=2, cut="1", mesh=mesh, timeout=120)
    elsewhere = {p for p in pipe.module.parameters() if p.is_meta}
    for block in pipe.module.model:
        if not elsewhere.issuperset(block.parameters()):
            fully_shard(block, mesh=mesh["data"], reshard_after_forward=reshard)
    fully_shard(pipe.module, mesh=mesh["data"], ignored_params=elsewhere)
    optimizer = torch.optim.SGD(pipe.parameters(), lr=0.05, momentum=0.9)
    half = slice(8 * (rank // 2), 8 * (rank // 2) + 8)
    for _ in range(3):
        pipe.backward(x[half], F.cross_entropy, y[half])
        optimizer.step()
        optimizer.zero_grad()
    return pipe.gather_state()


def half_sharded(rank: int) -> None:
    """Layers alone, whose gradients nobody would reduce."""
    from torch.distributed.fsdp import fully_shard

    learner, x, y = halves("dkp")
    pipe = fb.parallel.pipeline(learner, x, micro_batches=2, cut="1", timeout=60)
    own = [block for block in pipe.module.model if not next(block.parameters()).is_meta]
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("pipeline", "data"))
    fully_shard(own[0], mesh=mesh["data"])
    pipe.backward(x, F.cross_entropy, y)


def halves(rule: str) -> tuple[fb.Learner, Tensor, Tensor]:
    """A net of blocks, and a batch for it."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4)]
    model = nn.Sequential(*blocks, nn.Linear(6, 3)).double()
    x, y = torch.randn(16, 6, dtype=torch.float64), torch.arange(16) % 3
    return fb.attach(model, RULES[rule], example=x, seed=3), x, y


def test_sharded_stages(tmp_path: Path) -> None:
    """Their weights are those of one process that takes the micro-batches of all replicas in turn."""
    for rule, reshard in (("dkp", True), ("dkp", False), ("bp", True)):
        found = run_ranks(sharded, 4, tmp_path / f"{rule}{reshard}", rule, reshard)
        learner, x, y = halves(rule)
        optimizer = torch.optim.SGD(learner.parameters(), lr=0.05, momentum=0.9)
        for _ in range(3):
            for xs, ys in zip(x.chunk(4), y.chunk(4), strict=True):
                (F.cross_entropy(learner(xs), ys) / 4).backward()
            optimizer.step()
            optimizer.zero_grad()
        close(found[0], learner.state_dict())
        close(found[2], learner.state_dict())


def test_layers_sharded_alone_are_refused(tmp_path: Path) -> None:
    for failure in run_ranks(half_sharded, 2, tmp_path):
        assert failure.kind == "FeedbackError"
        assert "call `fully_shard(pipe.module" in failure.text


def compiled(rank: int, when: str) -> Any:
    """Steps with blocks that are compiled before `attach`, or after `pipeline`, or not."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 9), *(Checkpointed() for _ in range(4)), nn.Linear(9, 3)
    ).double()
    for block in model[1:5]:
        block.body[2].p = 0.0
    x, y = torch.randn(16, 6, dtype=torch.float64), torch.arange(16) % 3
    if when == "before":
        for block in model[1:5]:
            block.body.compile()
    learner = fb.attach(model, fb.DKP(), example=x, sites=["1", "2", "3", "4"])
    pipe = fb.parallel.pipeline(learner, x, timeout=240)
    if when == "after":
        for block in model[1:5]:
            block.body.compile()
    optimizer = torch.optim.SGD(pipe.parameters(), lr=0.05)
    for _ in range(3):
        pipe.backward(x, F.cross_entropy, y)
        optimizer.step()
        optimizer.zero_grad()
    return pipe.gather_state()


@pytest.mark.nightly
@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
@pytest.mark.parametrize("when", ["before", "after"])
def test_compiled_blocks(tmp_path: Path, when: str) -> None:
    """Within rounding, they give what they give as written."""
    close(run_ranks(compiled, 2, tmp_path, when)[0], compiled(0, ""), within=1e-11)


def test_a_replaced_stage_is_refused() -> None:
    """It would not be run, and its parameters not be trained."""
    x, y = torch.randn(4, 6), torch.arange(4) % 3
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))
    pipe = fb.parallel.pipeline(fb.attach(model, fb.DFA(), example=x), x)
    plain = pipe.module
    pipe.module = torch.compile(plain, backend="eager")
    with pytest.raises(fb.FeedbackError, match=r"pipe.module was replaced"):
        pipe.backward(x, F.cross_entropy, y)
    pipe.module = plain
    pipe.module.compile(backend="eager")
    pipe.backward(x, F.cross_entropy, y)
    compiled = [p.grad for p in pipe.parameters()]
    learner = fb.attach(copy.deepcopy(model), fb.DFA(), example=x)
    learner.zero_grad()
    F.cross_entropy(learner(x), y).backward()
    torch.testing.assert_close(compiled, [p.grad for p in learner.model.parameters()])


class Checkpointed(nn.Module):
    """A block that is run again in the backward pass, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(9, 9), nn.Tanh(), nn.Dropout(0.3), nn.Linear(9, 9))

    def forward(self, x: Tensor) -> Tensor:
        return x + checkpoint(self.body, x, use_reentrant=False)


def several(rank: int, ranks: int) -> dict[str, Any]:
    """The whole states of nets trained in several ways."""
    return {
        "checkpointed": blocks(lambda block: block),
        "accumulated": accumulated(),
        "bf16": blocks(lambda block: block, torch.bfloat16),
    }


def blocks(change: Any, autocast: torch.dtype | None = None) -> Any:
    torch.manual_seed(0)
    inner = [change(Checkpointed()) for _ in range(3)]
    model = nn.Sequential(nn.Linear(6, 9), *inner, nn.Linear(9, 3))
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(16, 6, generator=generator), torch.arange(16) % 3
    if autocast is None:
        model, x = model.double(), x.double()
    learner = fb.attach(model, fb.DKP(), example=x, sites=["1", "2", "3"])
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        pipe = fb.parallel.pipeline(learner, x, timeout=120)
        optimizer = torch.optim.SGD(pipe.parameters(), lr=0.05)
        for _ in range(4):
            pipe.backward(x, F.cross_entropy, y)
            optimizer.step()
            optimizer.zero_grad()
    return pipe.gather_state()


def accumulated() -> Any:
    """Two calls of backward for one step: gradients add up."""
    case = Case("plain", RULES["dkp"], rows=(8,))
    x, y = case.batch(0)
    pipe = fb.parallel.pipeline(case.learner(), x, micro_batches=2, timeout=120)
    optimizer = case.optimizer(pipe)
    for _ in range(2):
        for half in (slice(0, 4), slice(4, 8)):
            pipe.backward(x[half], lambda out, t: F.cross_entropy(out, t) / 2, y[half])
        optimizer.step()
        optimizer.zero_grad()
    return pipe.gather_state()


def test_ways_of_training(tmp_path: Path) -> None:
    alone = several(0, 1)
    found = run_ranks(several, 3, tmp_path, 3)[0]
    for way in alone:
        # the same operations in the same order, in bf16 too
        close(found[way], alone[way], within=1e-12)
    expected = Case("plain", RULES["dkp"], rows=(8,), micro_batches=4).naive_repeated(2)
    close(alone["accumulated"], expected)


def saved(rank: int, folder: str, load: bool) -> Any:
    """Two steps; then save, or before load what others saved. The state after them."""
    case = Case("mlp", RULES["dkp"])
    x, y = case.batch(0)
    pipe = fb.parallel.pipeline(case.learner(), x, timeout=120)
    optimizer = torch.optim.SGD(pipe.parameters(), lr=0.05)
    if load:
        state = pipe.state_dict()
        dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
        pipe.load_state_dict(state)
        pipe.step = 2
    for _ in range(2):
        pipe.backward(x, F.cross_entropy, y)
        optimizer.step()
        optimizer.zero_grad()
    if not load:
        dcp.save(pipe.state_dict(), checkpoint_id=folder)
    return pipe.gather_state()


def test_distributed_checkpoints(tmp_path: Path) -> None:
    """Saved by three ranks, gone on with by two, and by one."""
    folder = str(tmp_path / "saved")
    run_ranks(saved, 3, tmp_path / "three", folder, False)
    by_two = run_ranks(saved, 2, tmp_path / "two", folder, True)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        by_one = saved(0, folder, True)
    case = Case("mlp", RULES["dkp"], momentum=0.0)
    expected = case.naive_repeated(4)
    close(by_two, expected)
    close(by_one, expected)


def late(rank: int, rule: str, delay: int) -> Any:
    """Some steps whose gradients arrive late, with batches of several sizes."""
    pipe, losses = Case("mlp", RULES[rule]).piped(6, delay=delay, timeout=120)
    return [pipe.gather_state(), losses]


def late_alone(rule: str, delay: int) -> dict[str, Tensor]:
    """The same by `fb.Delayed` in one process: the definition of a delay."""
    case = Case("mlp", RULES[rule])
    learner = case.learner()
    optimizer = case.optimizer(learner)
    delayed = fb.Delayed(learner, delay)
    for step in range(6):
        x, y = case.batch(step)
        parts = min(case.micro_batches, len(x) // 2)
        for xs, ys in zip(x.tensor_split(parts), y.tensor_split(parts), strict=True):
            (F.cross_entropy(learner(xs), ys) * (len(xs) / len(x))).backward()
        delayed.exchange()
        optimizer.step()
        optimizer.zero_grad()
    return learner.state_dict()


def test_late_gradients(tmp_path: Path) -> None:
    for rule, delay in (("dfa", 1), ("dkp", 1), ("dkp", 2), ("bp", 1)):
        found = run_ranks(late, 2, tmp_path / f"{rule}{delay}", rule, delay)
        close(found[0][0], late_alone(rule, delay))


def test_delays_that_cannot_be() -> None:
    for rule, delay, words in (("kp", 1, "delay=0"), ("dkp", 5, "from 0 to 4")):
        with pytest.raises(fb.AttachError, match=words):
            Case("plain", RULES[rule]).piped(1, delay=delay)
