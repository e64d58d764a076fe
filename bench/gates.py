"""What a net's gates cost a direct rule: activations by pools, accuracy on held-out images of CIFAR-10.

python bench/gates.py --data-root DIR
python bench/gates.py --data-root DIR --slopes 0,0.3 --pools max,average --rules 'bp;dkp' --rates 0.05,0.1 --seeds 0,1,2

Six convolutions and two linear layers with batch norm (`net` of dkp_default.py), leaky ReLU of each slope (0 is ReLU), and
each pool. 8,000 training images, 2,000 others held out, 5 epochs in batches of 100, SGD with Nesterov momentum 0.9, a one-cycle
rate for W and B alike, decay 5e-4; feedback to all layers. Runs are appended to --json as they come, with the angle to
backprop's signal at every site on 500 held-out images after training.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from dkp_default import OPTIMIZERS, TRAIN, accuracy, images, net
from kept import Kept
from torch import nn

import feedbackward as fb

CELL = ("depth", "offset", "seed", "rate", "slope", "pool")
RULES: dict[str, fb.Rule] = {
    "bp": fb.BP(),
    "dkp": fb.DKP(),
    "dfa": fb.DFA(),
    "kp": fb.KolenPollack(),
    "segmented_kp": fb.SegmentedKP(),
    "segmented_kp, 3 steps": fb.SegmentedKP(steps=3),
    "frozen": fb.Frozen(),
    "bp, 2 frozen": fb.BP(),
    "bp, 4 frozen": fb.BP(),
}
# of six convolutions, those that lie below the segments of five and of three steps that begin at the output
FROZEN = {"bp, 2 frozen": 7, "bp, 4 frozen": 14}
POOLS: dict[str, type[nn.Module]] = {"max": nn.MaxPool2d, "average": nn.AvgPool2d}


def with_gates(model: nn.Sequential, slope: float, pool: str) -> nn.Sequential:
    """The model with leaky ReLUs of the slope, and with the pools; its weights stay as they are."""
    for name, module in model.named_children():
        if isinstance(module, nn.ReLU) and slope:
            model.register_module(name, nn.LeakyReLU(slope))
        elif isinstance(module, nn.MaxPool2d):
            model.register_module(name, POOLS[pool](2))
    return model


def flags(about: str, results: str) -> argparse.ArgumentParser:
    """The flags that say which nets are trained, and how."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--depth", type=int, default=6, help="convolutions, a multiple of 3")
    parser.add_argument("--slopes", default="0,0.3")
    parser.add_argument("--pools", default="max,average")
    parser.add_argument("--rates", default="0.05")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--offset", type=int, default=0, help="the first image")
    parser.add_argument("--json", type=Path, default=Path(results))
    return parser


def cells(given: argparse.Namespace, *others: str) -> Iterator[tuple[Any, ...]]:
    """The values of `CELL` and one of the others, for every combination that the flags name."""
    return itertools.product(
        [given.depth],
        [given.offset],
        map(int, given.seeds.split(",")),
        map(float, given.rates.split(",")),
        map(float, given.slopes.split(",")),
        given.pools.split(","),
        others,
    )


def main() -> None:
    parser = flags(__doc__, "bench/results/gates.json")
    parser.add_argument("--rules", default="bp;dkp;dfa", help=f"of {';'.join(RULES)}")
    given = parser.parse_args()
    torch.set_num_threads(1)
    x, y = images(given.data_root, given.offset)
    kept = Kept(given.json, (*CELL, "rule"))
    few = slice(TRAIN, TRAIN + 500)
    for key in cells(given, *given.rules.split(";")):
        if key in kept:
            continue
        depth, _, seed, rate, slope, pool, rule = key
        start = time.perf_counter()
        torch.manual_seed(seed)
        model = with_gates(net(depth), slope, pool)
        model[: FROZEN.get(rule, 0)].requires_grad_(False)
        learner = fb.attach(model, RULES[rule], example=x[:4], seed=seed)
        weights = [p for p in learner.parameters() if p.requires_grad]
        accurate = accuracy(learner, OPTIMIZERS["nesterov"](weights, rate), seed, x, y)
        found: dict[str, Any] = {"held_out": round(accurate, 2)}
        if not isinstance(RULES[rule], fb.BP | fb.Frozen):
            probe = fb.probe(
                learner, lambda out: F.cross_entropy(out, y[few]), x[few], jacobian=False
            )
            found["angles"] = {k: round(v.angle, 1) for k, v in probe.sites.items()}
        found["seconds"] = round(time.perf_counter() - start, 1)
        kept.add(key, found)
        print(*key[2:], f"{accurate:.1f}", f"{found['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
