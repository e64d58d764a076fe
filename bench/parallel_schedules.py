"""What bench/parallel.py times: PyTorch's own pipeline schedules for backprop, its data parallelism, one process, and
fb.parallel, each on the same nets and batches."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleavedZeroBubble,
)
from torch.nn.parallel import DistributedDataParallel

import feedbackward as fb
from feedbackward.experiment import nets
from feedbackward.experiment.nets.transformer import Block

CLASSES = 10
RULES = {"bp": fb.BP(), "dfa": fb.DFA(), "dkp": fb.DKP(), "dkp-plain": fb.DKP(whiten=False)}
# whose pipeline the ratios are of; whitening the 1,024 features of an FFN costs more than its layers
OWN = {"vgg16": "dkp", "transformer": "dkp", "inside": "dkp-plain"}
# seconds of forward, gradients of inputs, gradients of weights
Times = tuple[float, float, float]


@dataclass(frozen=True)
class Subject:
    """A net in stages, a batch for it, and how it is made. `cut`: the modules that end the stages."""

    make: Callable[[], nn.Sequential]
    x: Tensor
    y: Tensor
    cut: list[str]
    sites: Any
    times: list[Times] | None = None

    @property
    def stages(self) -> int:
        return len(self.cut) + 1

    def stage(self, rank: int) -> nn.Sequential:
        """The modules of a stage, as a user of PyTorch's schedules would take them."""
        model = self.make()
        names = [name for name, _ in model.named_children()]
        bounds = [0, *(names.index(name) + 1 for name in self.cut), len(names)]
        return model[bounds[rank] : bounds[rank + 1]]


def vgg16(batch: int, cut: list[str]) -> Subject:
    """VGG-16 with batch norm on images of 32 x 32."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, 32, 32, generator=generator)
    y = torch.randint(CLASSES, (batch,), generator=generator)

    def make() -> nn.Sequential:
        torch.manual_seed(0)
        layers = nets.build("vgg16", (3, 32, 32), CLASSES).named_children()
        return nn.Sequential(OrderedDict(layers))

    return Subject(make, x, y, cut, "layers")


class Mean(nn.Module):
    """Over the tokens."""

    def forward(self, h: Tensor) -> Tensor:
        return h.mean(1)


BLOCKS = 8
# the inputs of all Linear modules of a block, and its end, which cuts the skip path
INSIDE = ["norm1", "attention.mixed", "norm2", "ffn.act", ""]


def transformer(batch: int, cut: list[str], inside: bool = False) -> Subject:
    """Eight pre-norm blocks of width 256 on sequences of 32 tokens. inside: with sites in the blocks too."""
    width, tokens = 256, 32
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, tokens, 48, generator=generator)
    y = torch.randint(CLASSES, (batch,), generator=generator)

    def make() -> nn.Sequential:
        torch.manual_seed(0)
        layers: dict[str, nn.Module] = {"embed": nn.Linear(48, width)}
        for i in range(1, BLOCKS + 1):
            layers[f"block{i}"] = Block(width, 4, dropout=0.0)
        layers |= {"mean": Mean(), "head": nn.Linear(width, CLASSES)}
        return nn.Sequential(OrderedDict(layers))

    parts = INSIDE if inside else [""]
    sites = [f"block{i}.{part}".rstrip(".") for i in range(1, BLOCKS + 1) for part in parts]
    return Subject(make, x, y, cut, sites)


class _Sleep(torch.autograd.Function):
    """Passes its input on, and takes its time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, times: Times) -> Tensor:
        ctx.times = times
        time.sleep(times[0])
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs_input = ctx.needs_input_grad[0]
        time.sleep(ctx.times[2] + (ctx.times[1] if needs_input else 0.0))
        return (grad if needs_input else None), torch.zeros(1), None


class Sleeper(nn.Module):
    """A stage that sleeps as long as a real one works."""

    def __init__(self, times: Times, last: bool) -> None:
        super().__init__()
        self.weight, self.times, self.last = nn.Parameter(torch.zeros(1)), times, last

    def forward(self, x: Tensor) -> Tensor:
        h = _Sleep.apply(x, self.weight, self.times)
        return h[:, :CLASSES] if self.last else h


def sleeping(times: list[Times], batch: int, features: int) -> Subject:
    """Stages that sleep, with activities of so many features."""
    names = [str(i) for i in range(len(times) - 1)]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, features, generator=generator)
    y = torch.randint(CLASSES, (batch,), generator=generator)
    # the lowest stage gets no gradient from its input, so that part of it is put with the weights'
    first = (times[0][0], 0.0, times[0][2] + times[0][1])
    own = [first, *times[1:]]

    def make() -> nn.Sequential:
        return nn.Sequential(*(Sleeper(t, i == len(own) - 1) for i, t in enumerate(own)))

    return Subject(make, x, y, names, names, times)


SUBJECTS: dict[str, Callable[[int, list[str]], Subject]] = {
    "vgg16": vgg16,
    "transformer": transformer,
    "inside": partial(transformer, inside=True),
}


class Contestant:
    """Something that makes steps. `received`: bytes that this rank received for its backward passes."""

    optimizer: torch.optim.Optimizer

    def step(self) -> None:
        self.gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradients(self) -> None:
        raise NotImplementedError

    @property
    def received(self) -> int | None:
        return None

    def traced(self, steps: int, folder: Path) -> list[Any]:
        """What every rank did in so many steps: (what, step, micro-batch, start, end), by rank; on rank 0."""
        raise NotImplementedError


def contestant(name: str, subject: Subject, micro_batches: int) -> Contestant:
    """By name: `1f1b`, `gpipe`, `zero-bubble`; a rule, which is fb.parallel; `RULE ddp`; `RULE alone`."""
    rule, _, how = name.partition(" ")
    if how == "alone":
        return Alone(subject, RULES[rule], micro_batches)
    if how == "ddp":
        return Replicated(subject, RULES[rule])
    if rule in RULES:
        return Direct(subject, RULES[rule], micro_batches)
    return Backprop(subject, rule, micro_batches)


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)


class Direct(Contestant):
    """fb.parallel under a rule."""

    def __init__(self, subject: Subject, rule: fb.Rule, micro_batches: int) -> None:
        model, self.subject = subject.make(), subject
        if subject.times is not None:
            for layer, times in zip(model, subject.times, strict=True):
                layer.times = (times[0], 0.0, times[2])
        example = subject.x[: max(2, len(subject.x) // micro_batches)]
        learner = fb.attach(model, rule, example=example, sites=subject.sites)
        self.pipe = fb.parallel.pipeline(
            learner, example, micro_batches=micro_batches, cut=subject.cut, timeout=900
        )
        self.optimizer = _sgd(self.pipe.parameters())

    def gradients(self) -> None:
        self.pipe.backward(self.subject.x, F.cross_entropy, self.subject.y)

    @property
    def received(self) -> int:
        return self.pipe.bytes_in_backward

    def traced(self, steps: int, folder: Path) -> list[Any]:
        self.pipe.start_trace()
        for _ in range(steps):
            self.step()
        return self.pipe.write_trace(folder / "trace.json") or []


class Alone(Contestant):
    """One process, rank 0, which takes the micro-batches in turn; the others look on."""

    def __init__(self, subject: Subject, rule: fb.Rule, micro_batches: int) -> None:
        self.works = dist.get_rank() == 0
        self.learner = fb.attach(subject.make(), rule, example=subject.x[:4], sites=subject.sites)
        self.pairs = list(
            zip(subject.x.chunk(micro_batches), subject.y.chunk(micro_batches), strict=True)
        )
        self.optimizer = _sgd(self.learner.parameters())

    def gradients(self) -> None:
        for x, y in self.pairs if self.works else ():
            (F.cross_entropy(self.learner(x), y) / len(self.pairs)).backward()


class Replicated(Contestant):
    """DistributedDataParallel: every rank has the whole net and its part of the batch."""

    def __init__(self, subject: Subject, rule: fb.Rule) -> None:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        self.x, self.y = subject.x.chunk(ranks)[rank], subject.y.chunk(ranks)[rank]
        learner = fb.attach(subject.make(), rule, example=self.x[:4], sites=subject.sites)
        self.model = DistributedDataParallel(learner)
        self.optimizer = _sgd(self.model.parameters())

    def gradients(self) -> None:
        F.cross_entropy(self.model(self.x), self.y).backward()


class Backprop(Contestant):
    """A stock schedule of PyTorch on its own stages."""

    def __init__(self, subject: Subject, schedule: str, micro_batches: int) -> None:
        self.subject, rank = subject, dist.get_rank()
        module = _Sleeping(subject, rank) if subject.times else subject.stage(rank)
        inputs, outputs = self._shapes(len(subject.x) // micro_batches, rank)
        runner = (lambda: module.weights_runner) if subject.times else None
        stage = PipelineStage(
            module, rank, subject.stages, torch.device("cpu"),
            input_args=inputs, output_args=outputs, dw_builder=runner,
        )  # fmt: skip
        kind: Any = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}.get(schedule)
        if schedule == "zero-bubble":
            self.schedule: Any = ScheduleInterleavedZeroBubble(
                [stage], micro_batches, F.cross_entropy
            )
        else:
            self.schedule = kind(stage, micro_batches, F.cross_entropy)
        self.stage = stage
        self.optimizer = _sgd(module.parameters())
        self.first, self.last = rank == 0, rank == subject.stages - 1

    def _shapes(self, rows: int, rank: int) -> list[Tensor]:
        """What enters and leaves a stage."""
        found = [self.subject.x[:rows]]
        for each in range(rank + 1):
            if self.subject.times:
                last = each == self.subject.stages - 1
                found.append(found[-1][:, :CLASSES] if last else found[-1])
            else:
                with torch.no_grad():
                    found.append(self.subject.stage(each).eval()(found[-1]))
        return [torch.empty_like(t).requires_grad_(rank > 0 or t is found[-1]) for t in found[-2:]]

    def gradients(self) -> None:
        inputs = (self.subject.x,) if self.first else ()
        target = self.subject.y if self.last else None
        self.schedule.step(*inputs, target=target, return_outputs=False)

    def traced(self, steps: int, folder: Path) -> list[Any]:
        own: list[Any] = []
        for name, what in _ACTIONS.items():
            setattr(self.stage, name, _noted(getattr(self.stage, name), what, own))
        dist.barrier()
        zero = time.perf_counter()
        for _ in range(steps):
            self.step()
        own = [(*event[:3], event[3] - zero, event[4] - zero) for event in own]
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, own)
        return found if dist.get_rank() == 0 else []


# what a stage of PyTorch's does for a micro-batch, and how the picture calls it
_ACTIONS = {
    "forward_one_chunk": "forward",
    "backward_one_chunk": "backward",
    "backward_weight_one_chunk": "weights",
}


def _noted(action: Callable[..., Any], what: str, events: list[Any]) -> Callable[..., Any]:
    """The action, with a note of when it ran."""

    def run(index: int, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        found = action(index, *args, **kwargs)
        events.append((what, 0, index, start, time.perf_counter()))
        return found

    return run


class _Sleeping(nn.Module):
    """A stock stage that sleeps; its weights' gradients are a step of their own."""

    def __init__(self, subject: Subject, rank: int) -> None:
        super().__init__()
        assert subject.times is not None
        forward, inputs, self.seconds = subject.times[rank]
        self.body = Sleeper((forward, 0.0, inputs), rank == subject.stages - 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def weights_runner(self) -> None:
        time.sleep(self.seconds)
