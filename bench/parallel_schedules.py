"""What bench/parallel.py times: PyTorch's own pipeline schedules for backprop, and fb.parallel."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
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

import feedbackward as fb
from feedbackward.experiment import nets
from feedbackward.parallel.division import divide
from feedbackward.parallel.part import Part
from feedbackward.parallel.recording import record
from feedbackward.parallel.split import find_places

CLASSES = 10
# seconds of forward, gradients of inputs, gradients of weights
Times = tuple[float, float, float]


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
    """A stage that sleeps as long as a real one works. Of the lowest, gradients of the inputs of its inner
    layers count too, though it passes none on: `always`."""

    def __init__(self, times: Times, last: bool) -> None:
        super().__init__()
        self.weight, self.times, self.last = nn.Parameter(torch.zeros(1)), times, last

    def forward(self, x: Tensor) -> Tensor:
        h = _Sleep.apply(x, self.weight, self.times)
        return h[:, :CLASSES] if self.last else h


def sleepers(times: list[Times]) -> nn.Sequential:
    """A net of such stages."""
    return nn.Sequential(*(Sleeper(t, i == len(times) - 1) for i, t in enumerate(times)))


@dataclass(frozen=True)
class Subject:
    """A net in stages, a batch for it, and how it is made."""

    make: Callable[[], nn.Module]
    x: Tensor
    y: Tensor
    cut: list[str]
    sites: Any
    times: list[Times] | None = None

    @property
    def stages(self) -> int:
        return len(self.cut) + 1


def vgg16(batch: int, cut: list[str]) -> Subject:
    """VGG-16 with batch norm on images of 32 x 32."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, 32, 32, generator=generator)
    y = torch.randint(CLASSES, (batch,), generator=generator)

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nets.build("vgg16", (3, 32, 32), CLASSES)

    return Subject(make, x, y, cut, "layers")


def sleeping(times: list[Times], batch: int, features: int) -> Subject:
    """Stages that sleep, with activities of so many features."""
    names = [str(i) for i in range(len(times) - 1)]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, features, generator=generator)
    y = torch.randint(CLASSES, (batch,), generator=generator)
    # the lowest stage gets no gradient from its input, so its own part is put with the weights'
    first = (times[0][0], 0.0, times[0][2] + times[0][1])
    return Subject(lambda: sleepers([first, *times[1:]]), x, y, names, names, times)


class Direct:
    """fb.parallel under a rule."""

    def __init__(self, subject: Subject, rule: fb.Rule, micro_batches: int, timeout: float) -> None:
        model, self.subject = subject.make(), subject
        if subject.times is not None:
            for layer, times in zip(model, subject.times, strict=True):
                layer.times = (times[0], 0.0, times[2])
        rows = max(2, len(subject.x) // micro_batches)
        learner = fb.attach(model, rule, example=subject.x[:rows], sites=subject.sites)
        self.pipe = fb.parallel.pipeline(
            learner, subject.x[:rows], micro_batches=micro_batches, cut=subject.cut, timeout=timeout
        )
        self.optimizer = torch.optim.SGD(self.pipe.parameters(), lr=1e-3, momentum=0.9)

    def step(self) -> None:
        self.pipe.backward(self.subject.x, F.cross_entropy, self.subject.y)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Backprop:
    """A stock schedule of PyTorch on its own stages."""

    def __init__(self, subject: Subject, schedule: str, micro_batches: int) -> None:
        self.subject, rank = subject, dist.get_rank()
        module = _Sleeping(subject, rank) if subject.times else _Plain(subject, rank)
        rows = len(subject.x) // micro_batches
        inputs, outputs = module.shapes(rows)
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
        own = [p for p in module.parameters() if not p.is_meta]
        self.optimizer = torch.optim.SGD(own, lr=1e-3, momentum=0.9)
        self.first, self.last = rank == 0, rank == subject.stages - 1

    def step(self) -> None:
        inputs = (self.subject.x,) if self.first else ()
        target = self.subject.y if self.last else None
        self.schedule.step(*inputs, target=target, return_outputs=False)
        self.optimizer.step()
        self.optimizer.zero_grad()


class _Sleeping(nn.Module):
    """A stock stage that sleeps; its weights' gradients are a step of their own."""

    def __init__(self, subject: Subject, rank: int) -> None:
        super().__init__()
        assert subject.times is not None
        forward, inputs, self.seconds = subject.times[rank]
        self.last = rank == subject.stages - 1
        self.body = Sleeper((forward, 0.0, inputs), self.last)
        self.features = subject.x.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def weights_runner(self) -> None:
        time.sleep(self.seconds)

    def shapes(self, rows: int) -> tuple[Tensor, Tensor]:
        x = torch.empty(rows, self.features, requires_grad=True)
        y = torch.empty(rows, CLASSES if self.last else self.features, requires_grad=True)
        return x, y


class _Plain(nn.Module):
    """A real net's part, as a stock stage."""

    def __init__(self, subject: Subject, rank: int) -> None:
        super().__init__()
        model = subject.make()
        learner = fb.attach(model, fb.BP(), example=subject.x[:4], sites=subject.sites)
        places, chosen = find_places(learner, subject.x[:4], subject.cut)
        recording = record(model, subject.x[:4], places)
        self.division = divide(learner, recording, tuple(sorted(chosen)), subject.x[:4])
        own = {name.removeprefix("model.") for name in self.division.parts[rank]}
        for name, p in model.named_parameters():
            p.requires_grad_(name in own)
        self.model, self.rank, self.subject = model, rank, subject
        self.part = Part(model, recording, *self.division.bounds(rank))
        self.own = [p for name, p in model.named_parameters() if name in own]

    def parameters(self, recurse: bool = True) -> Any:
        return iter(self.own)

    def forward(self, x: Tensor) -> Tensor:
        first = self.rank == 0
        inputs = x if first else self.subject.x[: len(x)]
        return self.part.run(self.model, inputs, len(x), None if first else x)

    def shapes(self, rows: int) -> tuple[Tensor, Tensor]:
        kinds = self.division.recording.kinds
        below, above = self.division.bounds(self.rank)
        start = (3, 32, 32) if below is None else kinds[below][0]
        end = (CLASSES,) if above is None else kinds[above][0]
        grad = below is not None
        return (
            torch.empty(rows, *start, requires_grad=grad),
            torch.empty(rows, *end, requires_grad=True),
        )
