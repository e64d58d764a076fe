"""How far a direct rule can go at best: feedback that is set, in every step, to the best linear estimate of backprop's signals.

python bench/ceiling.py --data-root DIR

At every site `B` is the regression of backprop's signals on the errors, over a running average of some 50 batches. It is made
with the true signals, so this is no rule to train with; it tells what better estimates of backprop's signal are worth to a rule
that sends `e B`. The nets, images and recipe are those of gates.py. `size`: `e B` as the regression gives it, or scaled to the
norm of backprop's signals.
"""

from __future__ import annotations

import math
import time

import torch
import torch.nn.functional as F
from dkp_default import OPTIMIZERS, accuracy, images, net
from gates import CELL, cells, flags, with_gates
from kept import Kept
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
    """Accuracy on the held-out images, and the cosine to backprop's signal at each site in the last batch."""
    torch.manual_seed(seed)
    model = with_gates(net(depth), slope, pool)
    twin = with_gates(net(depth), slope, pool).train()
    learner = fb.attach(model, fb.DFA(operator=fb.Dense()), example=x[:4], seed=seed)
    weights = [p for p in learner.parameters() if p.requires_grad]
    for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        mine.data = theirs.data  # the same storage: the twin has the weights of every step
    best = BestLinear(twin, learner, scaled)
    found = accuracy(learner, OPTIMIZERS["nesterov"](weights, rate), seed, x, y, best.update)
    return found, best.cosines


def main() -> None:
    parser = flags(__doc__, "bench/results/ceiling.json")
    parser.add_argument("--sizes", default="true,scaled")
    given = parser.parse_args()
    torch.set_num_threads(1)
    x, y = images(given.data_root, given.offset)
    kept = Kept(given.json, (*CELL, "size"))
    for key in cells(given, *given.sizes.split(",")):
        if key in kept:
            continue
        depth, _, seed, rate, slope, pool, size = key
        start = time.perf_counter()
        accurate, cosines = run(slope, pool, depth, rate, seed, size == "scaled", x, y)
        angles = {k: round(math.degrees(math.acos(c)), 1) for k, c in cosines.items()}
        found = {"held_out": round(accurate, 2), "angles": angles}
        kept.add(key, found | {"seconds": round(time.perf_counter() - start, 1)})
        print(*key[2:], f"{accurate:.1f}", angles, flush=True)


if __name__ == "__main__":
    main()
