"""How far a direct rule can go at best: feedback that is set, in every step, to the best linear estimate of backprop's signals.

python bench/ceiling.py --data-root DIR

At every site `B` is the regression of backprop's signals on the errors, over a running average of some 50 batches. It is made
with the true signals, so this is no rule to train with; it tells what better estimates of backprop's signal are worth to a rule
that sends `e B`. The nets, images and recipe are those of gates.py. `size`: `e B` as the regression gives it, or scaled to the
norm of backprop's signals.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from dkp_default import BATCH, EPOCHS, HELD_OUT, OPTIMIZERS, TRAIN, images, net
from gates import with_gates
from torch import Tensor, nn

import feedbackward as fb

MEMORY, RIDGE = 0.98, 1e-3


class BestLinear:
    """The running regressions of backprop's signals on the errors; `update` sets the learner's feedback to them."""

    def __init__(self, model: nn.Module, learner: fb.Learner, scaled: bool) -> None:
        self.model, self.scaled = model, scaled
        self.feedback = {edge.site.name: learner.feedback_of(edge) for edge in learner.graph.edges}
        self.cosines: dict[str, float] = {}
        self.moment: Tensor | None = None
        self.cross = {name: torch.zeros_like(b).flatten(1) for name, b in self.feedback.items()}
        self.norm = dict.fromkeys(self.feedback, 0.0)

    def update(self, x: Tensor, y: Tensor) -> None:
        activities: dict[str, Tensor] = {}
        h = x
        for name, module in self.model.named_children():
            h = activities[name] = module(h)
        loss = F.cross_entropy(h, y)
        inner = [activities[name] for name in self.feedback]
        error, *signals = torch.autograd.grad(loss, [h, *inner])
        moment = error.T @ error
        self.moment = moment if self.moment is None else MEMORY * self.moment + moment
        ridge = RIDGE * self.moment.diagonal().mean() * torch.eye(len(moment))
        with torch.no_grad():
            for (name, b), signal in zip(self.feedback.items(), signals, strict=True):
                rows = signal.flatten(1)
                self.cross[name] = MEMORY * self.cross[name] + error.T @ rows
                self.norm[name] = MEMORY * self.norm[name] + rows.square().sum().item()
                best = torch.linalg.solve(self.moment + ridge, self.cross[name])
                if self.scaled:
                    sent = (self.moment * (best @ best.T)).sum()
                    best *= (self.norm[name] / sent).sqrt()
                b.copy_(best.view_as(b))
                sent = error @ best
                self.cosines[name] = F.cosine_similarity(
                    sent.flatten(), rows.flatten(), dim=0
                ).item()


def run(
    slope: float, pool: str, depth: int, rate: float, seed: int, scaled: bool, x: Tensor, y: Tensor
) -> tuple[float, dict[str, float]]:
    """Accuracy on the held-out images, and the angle to backprop's signal at each site in the last batch."""
    torch.manual_seed(seed)
    model = with_gates(net(depth), slope, pool)
    rule = fb.DFA(operator=fb.Dense())
    twin = with_gates(net(depth), slope, pool).train()
    learner = fb.attach(model, rule, example=x[:4], seed=seed)
    weights = [p for p in learner.parameters() if p.requires_grad]
    optimizer = OPTIMIZERS["nesterov"](weights, rate)
    steps = EPOCHS * (TRAIN // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, cycle_momentum=False
    )
    for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        mine.data = theirs.data  # the same storage: the twin has the weights of every step
    best = BestLinear(twin, learner, scaled)
    generator = torch.Generator().manual_seed(seed)
    learner.train()
    for _ in range(EPOCHS):
        for batch in torch.randperm(TRAIN, generator=generator).split(BATCH):
            best.update(x[batch], y[batch])
            optimizer.zero_grad()
            F.cross_entropy(learner(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
    learner.eval()
    with torch.no_grad():
        found = torch.cat(
            [learner(part).argmax(1) for part in x[TRAIN : TRAIN + HELD_OUT].split(500)]
        )
    return 100 * (found == y[TRAIN:]).float().mean().item(), best.cosines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--depth", type=int, default=6, help="convolutions, a multiple of 3")
    parser.add_argument("--slopes", default="0,0.3")
    parser.add_argument("--pools", default="max,average")
    parser.add_argument("--sizes", default="true,scaled")
    parser.add_argument("--rates", default="0.05")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--offset", type=int, default=0, help="the first image")
    parser.add_argument("--json", type=Path, default=Path("bench/results/ceiling.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    x, y = images(options.data_root, options.offset)
    runs = json.loads(options.json.read_text()) if options.json.exists() else []
    keys = ("depth", "offset", "seed", "rate", "slope", "pool", "size")
    done = {tuple(row[k] for k in keys) for row in runs}
    for key in itertools.product(
        [options.depth],
        [options.offset],
        map(int, options.seeds.split(",")),
        map(float, options.rates.split(",")),
        map(float, options.slopes.split(",")),
        options.pools.split(","),
        options.sizes.split(","),
    ):
        if key in done:
            continue
        depth, _, seed, rate, slope, pool, size = key
        start = time.perf_counter()
        found, cosines = run(slope, pool, depth, rate, seed, size == "scaled", x, y)
        row = dict(zip(keys, key, strict=True)) | {"held_out": round(found, 2)}
        row["angles"] = {k: round(math.degrees(math.acos(c)), 1) for k, c in cosines.items()}
        runs.append(row | {"seconds": round(time.perf_counter() - start, 1)})
        options.json.write_text(json.dumps(runs, indent=1) + "\n")
        print(*key[2:], f"{found:.1f}", row["angles"], flush=True)


if __name__ == "__main__":
    main()
