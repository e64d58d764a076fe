"""What decorrelated inputs do for backprop and for direct rules: accuracy on held-out images of CIFAR-10.

python bench/decorrelation.py --data-root DIR --rates 0.02 --decorrelate 0,0.001,0.01      # one seed
python bench/decorrelation.py --data-root DIR --rates 0.02 --decorrelate 0,0.001 --seeds 0,1,2

Net "3 conv" of bench/dkp_default.py: 8,000 training images, 2,000 others held out, 5 epochs in batches of 100, SGD with Nesterov
momentum 0.9, a one-cycle rate, decay 5e-4. A rate of 0 leaves the layers as they are. Every tenth sample of a batch is looked at.
Results are appended to --json as they come.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import time
from pathlib import Path

import torch
from dkp_default import NETS, OPTIMIZERS, accuracy, images

import feedbackward as fb
from feedbackward.decorrelation import Decorrelation

RULES: dict[str, fb.Rule] = {
    "bp": fb.BP(),
    "dfa": fb.DFA(),
    "dkp": fb.DKP(),
    "frozen": fb.Frozen(),
}


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--net", default="3 conv")
    parser.add_argument("--rules", default=",".join(RULES))
    parser.add_argument("--rates", type=numbers, default=[0.02])
    parser.add_argument("--decorrelate", type=numbers, default=[0, 0.001])
    parser.add_argument("--seeds", type=numbers, default=[0])
    parser.add_argument("--json", type=Path, default=Path("runs/decorrelation.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    x, y = images(given.data_root)
    given.json.parent.mkdir(parents=True, exist_ok=True)
    runs = json.loads(given.json.read_text()) if given.json.exists() else []
    for seed, rule, lr, rate in itertools.product(
        map(int, given.seeds), given.rules.split(","), given.rates, given.decorrelate
    ):
        torch.manual_seed(seed)
        model = NETS[given.net]()
        decorrelation = Decorrelation(model, rate) if rate else None
        learner = fb.attach(model, RULES[rule], example=x[:4], seed=seed)
        trained = [p for p in learner.parameters() if p.requires_grad]
        optimizer = OPTIMIZERS["nesterov"](trained, lr)
        if decorrelation is not None:
            optimizer.register_step_post_hook(lambda *step, done=decorrelation: done.step())
        start = time.perf_counter()
        found = accuracy(learner, optimizer, seed, x, y)
        run = {
            "net": given.net,
            "rule": rule,
            "rate": lr,
            "decorrelation": rate,
            "seed": seed,
            "accuracy": found,
            "seconds": round(time.perf_counter() - start, 1),
            "torch": torch.__version__,
            "machine": platform.machine(),
        }
        runs.append(run)
        given.json.write_text("[\n" + ",\n".join(map(json.dumps, runs)) + "\n]\n")
        print(run, flush=True)


if __name__ == "__main__":
    main()
