"""Highway KP beside backprop and direct feedback on ResNet-20: accuracy on held-out images of CIFAR-10.

python bench/highway.py --data-root DIR
python bench/highway.py --data-root DIR --rules 'bp;k = 1' --seeds 0,1 --epochs 10

8,000 training images with random flips, 2,000 others held out, batches of 100, SGD with Nesterov momentum 0.9, a
one-cycle rate, decay 5e-4. Shortcuts are of option A, and the scale of every branch's last norm starts at zero.
The angles to backprop's gradient are those of the lowest block and the mean over the blocks, on 500 held-out images
after training. Results are appended to --json as they come.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from dkp_default import BATCH, TRAIN, images
from kept import Kept
from torch import Tensor, nn

import feedbackward as fb
from feedbackward.experiment.nets.resnet import ResNet
from feedbackward.rules import HighwayKP

LAYERS, BLOCKS = "layers", "blocks"
RULES: dict[str, tuple[fb.Rule, str]] = {
    "bp": (fb.BP(), LAYERS),
    "k = 1": (HighwayKP(branches=1), LAYERS),
    "k = 0": (HighwayKP(branches=0), LAYERS),
    "DFA to blocks": (fb.DFA(), BLOCKS),
    "k = 2": (HighwayKP(branches=2), LAYERS),
    "frozen": (fb.Frozen(), BLOCKS),
    "kp": (fb.KolenPollack(init="mirrored"), LAYERS),
    "DKP to blocks": (fb.DKP(), BLOCKS),
}


def resnet20() -> ResNet:
    model = ResNet((3, 32, 32), 10, widths=(16, 32, 64), depth=3, project=False)
    for block in model.stages:
        nn.init.zeros_(block.norm2.weight)  # type: ignore[union-attr, arg-type]
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def trained(learner: fb.Learner, rate: float, epochs: int, seed: int, x: Tensor, y: Tensor) -> None:
    parameters = [p for p in learner.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = epochs * (TRAIN // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, cycle_momentum=False
    )
    generator = torch.Generator().manual_seed(seed)
    learner.train()
    for _ in range(epochs):
        for batch in torch.randperm(TRAIN, generator=generator).split(BATCH):
            flip = torch.rand(BATCH, 1, 1, 1, generator=generator) < 0.5
            inputs = torch.where(flip, x[batch].flip(3), x[batch])
            optimizer.zero_grad()
            F.cross_entropy(learner(inputs), y[batch]).backward()
            optimizer.step()
            schedule.step()


def measured(learner: fb.Learner, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Held-out accuracy, and the angles of the first convolutions of the blocks."""
    learner.eval()
    with torch.no_grad():
        found = torch.cat([learner(part).argmax(1) for part in x[TRAIN:].split(500)])
    accuracy = 100 * (found == y[TRAIN:]).float().mean().item()
    few = slice(TRAIN, TRAIN + 500)
    rows = fb.probe(learner, lambda out: F.cross_entropy(out, y[few]), x[few], jacobian=False)
    angles = [rows.parameters[k].angle for k in rows.parameters if k.endswith("conv1.weight")]
    mean = sum(angles) / len(angles)
    return {"held_out": accuracy, "lowest": round(angles[0], 1), "mean": round(mean, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--rules", default=";".join(RULES), help="names, with ; between them")
    parser.add_argument("--rates", default="0.1")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--offset", type=int, default=0, help="the first image")
    parser.add_argument("--json", type=Path, default=Path("bench/results/highway_runs.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    x, y = images(options.data_root, options.offset)
    kept = Kept(options.json, ("rule", "rate", "seed", "epochs", "offset"))
    seeds, rates = options.seeds.split(","), options.rates.split(",")
    for seed, rate, name in itertools.product(seeds, rates, options.rules.split(";")):
        key = (name, float(rate), int(seed), options.epochs, options.offset)
        if key in kept:
            continue
        start = time.perf_counter()
        torch.manual_seed(key[2])
        rule, sites = RULES[name]
        learner = fb.attach(resnet20(), rule, example=x[:4], sites=sites, seed=key[2])
        trained(learner, key[1], options.epochs, key[2], x, y)
        found = measured(learner, x, y)
        found["seconds"] = round(time.perf_counter() - start, 1)
        kept.add(key, found | {"torch": torch.__version__, "machine": platform.machine()})
        print(f"{name:<14} rate {rate}  seed {seed}: {found['held_out']:.1f}", flush=True)


if __name__ == "__main__":
    main()
