"""Nets, rules and the naive oracle of the tests of `fb.parallel`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import feedbackward as fb

CLASSES = 3


def mlp() -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU()]
    for _ in range(4):
        layers += [nn.Linear(9, 9), nn.BatchNorm1d(9), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(9, CLASSES))


def plain() -> nn.Module:
    """Nothing but an activation between two layers."""
    layers: list[nn.Module] = [nn.Linear(6, 9), nn.Tanh()]
    for _ in range(3):
        layers += [nn.Linear(9, 9), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(9, CLASSES))


class Convolutions(nn.Module):
    """Functional activations, which no module makes, and one that works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.third = nn.Conv2d(4, 5, 3, padding=1)
        self.hidden, self.head = nn.Linear(5 * 4, 7), nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(F.relu(self.norm(self.first(x)), inplace=True), 2)
        h = F.relu(self.second(h))
        h = F.max_pool2d(F.relu(self.third(h)), 2)
        return self.head(F.relu(self.hidden(h.flatten(1))))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.two(F.relu(self.norm(self.one(x)))))


def residual() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), Block(), Block(), nn.Dropout(0.4), Block(), nn.Dropout(0.2), nn.Linear(8, CLASSES)
    )  # fmt: skip


@dataclass(frozen=True)
class Relayed(fb.Rule):
    """Fixed feedback from two relays, so that an error of an inner layer crosses a boundary."""

    name = "relayed"
    label = "Relayed"
    paper = "none"
    feeds = fb.LayerInput

    def graph(self, sites: Sequence[Any], source: fb.Source) -> fb.Graph:
        middle = len(sites) // 2
        far = [(sites[middle].source, site) for site in sites[:middle]]
        near = [(sites[-1].source, site) for site in sites[middle:]]
        edges = [fb.Edge(source, site, fb.Dense()) for source, site in (*far, *near)]
        return fb.Graph(tuple(sites), tuple(edges))


@dataclass(frozen=True)
class Case:
    """What to train, and how. `rows`: of the batches, in turn."""

    net: str
    rule: fb.Rule
    rows: tuple[int, ...] = (16, 18, 13)
    micro_batches: int = 4
    sites: Any = "layers"
    momentum: float = 0.9

    def learner(self) -> fb.Learner:
        torch.manual_seed(0)
        model = NETS[self.net]().double()
        return fb.attach(model, self.rule, example=self.batch(0)[0], sites=self.sites, seed=3)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        rows = self.rows[step % len(self.rows)]
        generator = torch.Generator().manual_seed(step + 1)
        shape = (2, 8, 8) if self.net == "convolutions" else (6,)
        x = torch.randn(rows, *shape, generator=generator, dtype=torch.float64)
        return x, torch.randint(CLASSES, (rows,), generator=generator)

    def optimizer(self, of: nn.Module) -> torch.optim.Optimizer:
        """A rank may have nothing to train, which an optimizer refuses."""
        own = list(of.parameters()) or [nn.Parameter(torch.zeros(1))]
        return torch.optim.SGD(own, lr=0.05, momentum=self.momentum)

    def naive_repeated(self, steps: int) -> dict[str, Tensor]:
        """As `naive`, with the first batch in every step."""
        return self.naive(steps, lambda step: 0)

    def naive(
        self, steps: int, batch: Callable[[int], int] = lambda step: step
    ) -> dict[str, Tensor]:
        """The state after these steps of one process: micro-batches in turn, each with its share of
        the mean loss of the batch."""
        learner = self.learner()
        optimizer = self.optimizer(learner)
        for step in range(steps):
            x, y = self.batch(batch(step))
            parts = min(self.micro_batches, len(x) // 2)
            for xs, ys in zip(x.tensor_split(parts), y.tensor_split(parts), strict=True):
                share = len(xs) / len(x)
                if learner.attached.needs_target:
                    learner.target(ys, scale=share)
                (F.cross_entropy(learner(xs), ys) * share).backward()
            optimizer.step()
            optimizer.zero_grad()
        return learner.state_dict()

    def piped(self, steps: int, **options: Any) -> tuple[fb.parallel.Pipeline, list[float]]:
        """The pipeline of this rank after these steps, and the losses."""
        learner = self.learner()
        x, _ = self.batch(0)
        pipe = fb.parallel.pipeline(learner, x, micro_batches=self.micro_batches, **options)
        optimizer = self.optimizer(pipe)
        losses = []
        for step in range(steps):
            losses.append(pipe.backward(*self._arguments(step)))
            optimizer.step()
            optimizer.zero_grad()
        return pipe, [loss.item() for loss in losses[-4:]]

    def _arguments(self, step: int) -> tuple[Any, ...]:
        x, y = self.batch(step)
        return x, F.cross_entropy, y


NETS = {"mlp": mlp, "plain": plain, "convolutions": Convolutions, "residual": residual}
RULES = {
    "bp": fb.BP(),
    "dfa": fb.DFA(),
    "dkp": fb.DKP(),
    "dkp published": fb.DKP.published(),
    "drtp": fb.DRTP(),
    "dgl": fb.DGL(),
    "fa": fb.FA(),
    "kp": fb.KolenPollack(),
    "relayed": Relayed(),
    "segmented": fb.SegmentedKP(steps=2),
    "frozen": fb.Frozen(),
}
