"""Time of one training step of a rule relative to backprop's, interleaved in one process.

    python bench/step_time.py --model vgg16 --batch 64 --rounds 9 --threads 2 --out bench/results/step_time.json

A step is zero_grad + forward + loss + backward + SGD step (momentum 0.9, weights and feedback alike). Each round
times every rule once, in an order that rotates from round to round; the ratio is taken within the round, and its
median over the rounds is printed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import feedbackward as fb
from feedbackward.experiment import nets


def make_step(rule: fb.Rule, args: argparse.Namespace) -> Callable[[], None]:
    torch.manual_seed(0)
    shape = (3, args.size, args.size)
    model = nets.build(args.model, shape, args.classes)
    x, y = torch.randn(args.batch, *shape), torch.randint(args.classes, (args.batch,))
    learner = fb.attach(model, rule, example=x[:2]).train()
    optimizer = torch.optim.SGD(learner.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(learner(x), y).backward()
        optimizer.step()

    return step


def measure(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-2, rounds):  # two rounds to warm up
        k = turn % len(names)
        for name in names[k:] + names[:k]:
            begin = time.perf_counter()
            steps[name]()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="vgg16")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rules = {"bp": fb.BP(), "dfa": fb.DFA(), "dkp": fb.DKP(), "dkp_centred": fb.DKP(center=True)}
    seconds = measure({name: make_step(rule, args) for name, rule in rules.items()}, args.rounds)
    rows = {}
    print(
        f"{args.model}, batch {args.batch}, {args.size} px, {args.classes} classes, {args.threads} threads, n = {args.rounds}"
    )
    print(f"{'rule':<12}{'ms':>9}{'ratio':>8}{'min':>8}{'max':>8}")
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(values, seconds["bp"], strict=True)]
        rows[name] = {
            "ms": 1e3 * statistics.median(values),
            "ratio": statistics.median(ratios),
            "ratios": ratios,
        }
        print(
            f"{name:<12}{rows[name]['ms']:9.1f}{rows[name]['ratio']:8.3f}{min(ratios):8.3f}{max(ratios):8.3f}"
        )
    if args.out:
        machine = {
            "cpu": _cpu(),
            "threads": args.threads,
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        settings = {k: v for k, v in vars(args).items() if k != "out"}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(
            json.dumps({"machine": machine, "settings": settings, "rules": rows}, indent=1) + "\n"
        )


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor()
    )


if __name__ == "__main__":
    main()
