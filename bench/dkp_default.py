"""Which form of DKP suits one rate for W and B: accuracy on held-out images of CIFAR-10.

python bench/dkp_default.py --data-root DIR                  # every form, both nets, two rates
python bench/dkp_default.py --data-root DIR --nets '6 conv' --forms 'dfa;default' --seeds 0,1

8,000 training images, 2,000 others held out, 5 epochs in batches of 100, SGD with Nesterov momentum
0.9, a one-cycle rate, decay 5e-4; feedback to all layers. Results are appended to --json as they come.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import feedbackward as fb
from feedbackward.experiment.data import DataConfig, load_data
from feedbackward.operators import Weights
from feedbackward.rules.direct.dkp import spread

TRAIN, HELD_OUT, BATCH, EPOCHS = 8000, 2000, 100, 5


@dataclass(frozen=True)
class Scaled(fb.DKP):
    """DKP whose feedback gradient is multiplied by `ratio`, and divided by a power of the spread s."""

    ratio: float = 1.0
    power: int = 0
    normalise: bool = False

    def feedback_grad(self, edge: fb.Edge, weights: Weights, d: Tensor, h: Tensor) -> Weights:
        s = spread(h).to(h.dtype)
        return edge.operator.correlate(weights, d * self.ratio / s**self.power, h, self.center)


FORMS: dict[str, fb.Rule] = {
    "bp": fb.BP(),
    "frozen": fb.Frozen(),
    "dfa": fb.DFA(),
    "published": fb.DKP.published(),
    "default": fb.DKP(),
    "centred, 1": Scaled(),
    "centred, 1/10": Scaled(ratio=0.1),
    "centred, 1/30": Scaled(ratio=1 / 30),
    "centred / s, 0.3": Scaled(ratio=0.3, power=1),
    "centred / s, 1": Scaled(power=1),
    "centred / s, 3": Scaled(ratio=3.0, power=1),
    "centred / s, 10": Scaled(ratio=10.0, power=1),
    "centred / s^2, 1": Scaled(power=2),
    "centred / s^2, 10": Scaled(ratio=10.0, power=2),
    "centred / s^2, 30": Scaled(ratio=30.0, power=2),
    "centred, 1/30, random start": Scaled(ratio=1 / 30, operator=fb.Dense()),
}


def convolution(inputs: int, outputs: int, pool: bool) -> list[nn.Module]:
    layers = [
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]
    return [*layers, nn.MaxPool2d(2)] if pool else layers


def net(depth: int) -> nn.Sequential:
    """`depth` convolutions of 16, 32 and 64 channels, three pools, and two linear layers."""
    layers: list[nn.Module] = []
    before = 3
    for channels in (16, 32, 64):
        for i in range(depth // 3):
            layers += convolution(before, channels, pool=i == depth // 3 - 1)
            before = channels
    top = [nn.Flatten(), nn.Linear(1024, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10)]
    return nn.Sequential(*layers, *top).to(memory_format=torch.channels_last)  # type: ignore[no-any-return]


NETS: dict[str, Callable[[], nn.Sequential]] = {"3 conv": lambda: net(3), "6 conv": lambda: net(6)}


def accuracy(
    model: nn.Sequential, rule: fb.Rule, rate: float, seed: int, x: Tensor, y: Tensor
) -> float:
    """Percent of the held-out images that are right after training; nan where the loss was."""
    learner = fb.attach(model, rule, example=x[:4], seed=seed)
    trained = [p for p in learner.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = EPOCHS * (TRAIN // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, cycle_momentum=False
    )
    generator = torch.Generator().manual_seed(seed)
    learner.train()
    for _ in range(EPOCHS):
        for batch in torch.randperm(TRAIN, generator=generator).split(BATCH):
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--nets", default=",".join(NETS))
    parser.add_argument("--forms", default=";".join(FORMS), help="names, with ; between them")
    parser.add_argument("--rates", default="0.02,0.05")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--json", type=Path, default=Path("bench/results/dkp_default.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = load_data(DataConfig(name="cifar10", root=options.data_root)).train
    x = data.images[: TRAIN + HELD_OUT].float() / 255
    mean, std = (f(x[:TRAIN], (0, 2, 3), keepdim=True) for f in (torch.mean, torch.std))
    x = ((x - mean) / std).contiguous(memory_format=torch.channels_last)
    y = data.labels[: TRAIN + HELD_OUT]
    known = json.loads(options.json.read_text()) if options.json.exists() else []
    done = {(r["net"], r["form"], r["rate"], r["seed"]) for r in known}
    choices = (options.nets, options.rates, options.seeds)
    nets, rates, seeds = (text.split(",") for text in choices)
    for name, form, rate, seed in itertools.product(nets, options.forms.split(";"), rates, seeds):
        key = (name, form, float(rate), int(seed))
        if key in done:
            continue
        start = time.perf_counter()
        torch.manual_seed(key[3])
        value = accuracy(NETS[name](), FORMS[form], key[2], key[3], x, y)
        row = dict(zip(("net", "form", "rate", "seed"), key, strict=True))
        row |= {"held_out": value, "seconds": round(time.perf_counter() - start, 1)}
        known.append(row | {"torch": torch.__version__, "machine": platform.machine()})
        options.json.write_text(json.dumps(known, indent=1) + "\n")
        print(f"{name}  {form:<28} rate {rate}  seed {seed}: {value:.1f}", flush=True)


if __name__ == "__main__":
    main()
