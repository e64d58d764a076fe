"""Which form of DKP suits one rate and one optimizer for W and B: accuracy on held-out images of CIFAR-10.

python bench/dkp_default.py --data-root DIR                  # every form, both nets, two rates
python bench/dkp_default.py --data-root DIR --nets '6 conv' --forms 'dfa;default' --seeds 0,1
python bench/dkp_default.py --data-root DIR --nets '3 conv' --optimizers adam --rates 0.003

8,000 training images, 2,000 others held out, 5 epochs in batches of 100, a one-cycle rate, decay 5e-4
(of AdamW 1e-2); feedback to all layers. Optimizers: `nesterov` (SGD, momentum 0.9), `sgd` (none), `adam`,
`adamw`. Results are appended to --json as they come.
"""

from __future__ import annotations

import argparse
import itertools
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from kept import Kept
from torch import Tensor, nn

import feedbackward as fb
from feedbackward.experiment.data import DataConfig, load_data
from feedbackward.operators import Weights

TRAIN, HELD_OUT, BATCH, EPOCHS = 8000, 2000, 100, 5


@dataclass(frozen=True)
class Scaled(fb.DKP):
    """Centred DKP that sends by `B` itself; its gradient is multiplied by a ratio of powers of the spread s."""

    factor: Callable[[Tensor], Tensor] = torch.ones_like
    center: bool = True
    orthogonal: bool = False
    whiten: bool = False

    def feedback_grad(self, edge: fb.Edge, weights: Weights, d: Tensor, h: Tensor) -> Weights:
        scaled = d * self.factor(spread(h)).to(d.dtype)
        return edge.operator.correlate(weights, scaled, h, self.center)


def spread(h: Tensor) -> Tensor:
    """The root of the summed variances of the features; 1 where nothing varies."""
    rows = h.flatten(1)
    s = torch.linalg.vector_norm(rows - rows.mean(0)) / math.sqrt(len(rows))
    return torch.where(s > 0, s, 1.0)


FORMS: dict[str, fb.Rule] = {
    "bp": fb.BP(),
    "frozen": fb.Frozen(),
    "dfa": fb.DFA(),
    "published": fb.DKP.published(),
    "default": fb.DKP(),
    "centred": fb.DKP(center=True),
    "strength 0.2": fb.DKP(center=True, strength=0.2),
    "not whitened, strength 0.2": fb.DKP(center=True, whiten=False, strength=0.2),
    "not orthogonal": fb.DKP(center=True, whiten=False, orthogonal=False),
    "orthogonal, strength 0.5": fb.DKP(center=True, whiten=False, strength=0.5),
    "orthogonal, strength 0.1": fb.DKP(center=True, whiten=False, strength=0.1),
    "orthogonal, random start": fb.DKP(
        center=True, whiten=False, strength=0.2, operator=fb.Dense()
    ),
    "30 / (s^2 + 30 s)": Scaled(factor=lambda s: 30 / (s.square() + 30 * s)),
    "1 / s": Scaled(factor=lambda s: 1 / s),
    "30 / s^2": Scaled(factor=lambda s: 30 / s.square()),
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "nesterov": partial(torch.optim.SGD, momentum=0.9, nesterov=True, weight_decay=5e-4),
    "sgd": partial(torch.optim.SGD, weight_decay=5e-4),
    "adam": partial(torch.optim.Adam, weight_decay=5e-4),
    "adamw": partial(torch.optim.AdamW, weight_decay=1e-2),
}


def convolution(inputs: int, outputs: int, pool: bool) -> list[nn.Module]:
    layers = [
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]
    return [*layers, nn.MaxPool2d(2)] if pool else layers


def net(depth: int, widths: tuple[int, ...] = (16, 32, 64)) -> nn.Sequential:
    """`depth` convolutions of three widths, three pools, and two linear layers."""
    layers: list[nn.Module] = []
    before = 3
    for channels in widths:
        for i in range(depth // 3):
            layers += convolution(before, channels, pool=i == depth // 3 - 1)
            before = channels
    top = [
        nn.Flatten(),
        nn.Linear(16 * before, 128),
        nn.BatchNorm1d(128),
        nn.ReLU(),
        nn.Linear(128, 10),
    ]
    return nn.Sequential(*layers, *top).to(memory_format=torch.channels_last)  # type: ignore[no-any-return]


NETS: dict[str, Callable[[], nn.Sequential]] = {
    "3 conv": lambda: net(3),
    "6 conv": lambda: net(6),
    "3 conv wide": lambda: net(3, (32, 64, 128)),
}


def accuracy(
    learner: fb.Learner,
    optimizer: torch.optim.Optimizer,
    seed: int,
    x: Tensor,
    y: Tensor,
    before: Callable[[Tensor, Tensor], None] = lambda x, y: None,
) -> float:
    """Percent of the held-out images that are right after training; nan where the loss was. `before` is called with each batch."""
    steps, rate = EPOCHS * (TRAIN // BATCH), optimizer.param_groups[0]["lr"]
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, cycle_momentum=False
    )
    generator = torch.Generator().manual_seed(seed)
    learner.train()
    for _ in range(EPOCHS):
        for batch in torch.randperm(TRAIN, generator=generator).split(BATCH):
            before(x[batch], y[batch])
            optimizer.zero_grad()
            loss = F.cross_entropy(learner(x[batch]), y[batch])
            loss.backward()
            optimizer.step()
            schedule.step()
        if not loss.isfinite():
            return float("nan")
    learner.eval()
    with torch.no_grad():
        found = torch.cat([learner(part).argmax(1) for part in x[TRAIN:].split(500)])
    return 100 * (found == y[TRAIN:]).float().mean().item()


def images(root: Path, offset: int = 0) -> tuple[Tensor, Tensor]:
    """The training images, normalised, and after them those that are held out; and their labels."""
    data = load_data(DataConfig(name="cifar10", root=root)).train
    part = slice(offset, offset + TRAIN + HELD_OUT)
    x = data.images[part].float() / 255
    mean, std = (f(x[:TRAIN], (0, 2, 3), keepdim=True) for f in (torch.mean, torch.std))
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last), data.labels[part]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--nets", default="3 conv,6 conv", help=", ".join(NETS))
    parser.add_argument("--forms", default=";".join(FORMS), help="names, with ; between them")
    parser.add_argument("--optimizers", default="nesterov")
    parser.add_argument("--rates", default="0.02,0.05")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--offset", type=int, default=0, help="the first image")
    parser.add_argument("--json", type=Path, default=Path("bench/results/dkp_default.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    x, y = images(options.data_root, options.offset)
    kept = Kept(options.json, ("net", "form", "optimizer", "rate", "seed", "offset"))
    choices = (options.nets, options.optimizers, options.rates, options.seeds)
    nets, optimizers, rates, seeds = (text.split(",") for text in choices)
    forms = options.forms.split(";")
    for name, form, kind, rate, seed in itertools.product(nets, forms, optimizers, rates, seeds):
        key = (name, form, kind, float(rate), int(seed), options.offset)
        if key in kept:
            continue
        start = time.perf_counter()
        torch.manual_seed(key[4])
        learner = fb.attach(NETS[name](), FORMS[form], example=x[:4], seed=key[4])
        trained = [p for p in learner.parameters() if p.requires_grad]
        value = accuracy(learner, OPTIMIZERS[kind](trained, key[3]), key[4], x, y)
        found = {"held_out": value, "seconds": round(time.perf_counter() - start, 1)}
        kept.add(key, found | {"torch": torch.__version__, "machine": platform.machine()})
        print(f"{name}  {form:<24} {kind} {rate}  seed {seed}: {value:.1f}", flush=True)


if __name__ == "__main__":
    main()
