"""The time of a training step by this version and by an earlier one, side by side.

    git worktree add /tmp/old COMMIT
    python bench/step_versions.py /tmp/old/src

Two processes, one for each version, take turns of a few steps on one thread; what is compared is the time of their own CPU, so
that other programs disturb it little. Printed: the median of each, and of the ratios of neighbouring turns with their quartiles.
Whether a difference could be chance is told by running the same version against itself.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parents[1] / "src"
# net, rule, steps in a turn
CASES = [("mlp", rule, 20) for rule in ("dfa", "dkp", "kp")]
CASES += [("vgg16", rule, 2) for rule in ("dfa", "dkp", "kp")]


def main() -> None:
    """Compare, or be one of the two that are compared."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, help="the folder `src` of the other version")
    parser.add_argument("--turns", type=int, default=31)
    parser.add_argument("--cases", default="", help="only those that begin so")
    args = parser.parse_args()
    sides = [_start(args.old), _start(HERE)]
    print(json.dumps({"python": platform.python_version(), "machine": _processor()}))
    for case in CASES:
        if not " ".join(map(str, case)).startswith(args.cases):
            continue
        for side in sides:
            _ask(side, *case)
        turns: list[list[float]] = [[], []]
        for turn in range(args.turns):
            for i in (0, 1) if turn % 2 else (1, 0):
                turns[i].append(_ask(sides[i], *case))
        ratios = [new / old for old, new in zip(*turns, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        old, new = (1e3 * statistics.median(side) for side in turns)
        print(
            f"{case[0]} {case[1]}: old {old:.2f} ms, new {new:.2f} ms, ratio {middle:.3f} "
            f"(quartiles {low:.3f}, {high:.3f}; of the fastest turns {min(turns[1]) / min(turns[0]):.3f}), "
            f"n = {args.turns}",
            flush=True,
        )


def _start(source: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _WORKER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def _ask(side: subprocess.Popen[str], *case: object) -> float:
    assert side.stdin is not None
    assert side.stdout is not None
    side.stdin.write(" ".join(map(str, case)) + "\n")
    side.stdin.flush()
    return float(side.stdout.readline())


def _processor() -> str:
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


# it must run with either version, so it names the rules by what both have
_WORKER = """
import sys, time, torch
import torch.nn.functional as F
import feedbackward as fb
from feedbackward.experiment import nets

torch.set_num_threads(1)
published = getattr(fb.DKP, "published", fb.DKP)
rules = {"dfa": fb.DFA, "dkp": published, "kp": fb.KolenPollack}

def build(net, rule):
    torch.manual_seed(0)
    if net == "mlp":
        layers = [part for _ in range(6) for part in (torch.nn.Linear(256, 256), torch.nn.ReLU())]
        model, x = torch.nn.Sequential(*layers, torch.nn.Linear(256, 10)), torch.randn(100, 256)
    else:
        model, x = nets.build(net, (3, 32, 32), 10), torch.randn(32, 3, 32, 32)
    learner = fb.attach(model, rules[rule](), example=x[:4])
    return learner, x, torch.randint(10, (len(x),)), torch.optim.SGD(learner.parameters(), lr=1e-3, momentum=0.9)

known = {}
for line in sys.stdin:
    net, rule, steps = line.split()
    if (net, rule) not in known:
        known[net, rule] = build(net, rule)
    learner, x, y, optimizer = known[net, rule]
    begin = time.thread_time()
    for _ in range(int(steps)):
        F.cross_entropy(learner(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    print((time.thread_time() - begin) / int(steps), flush=True)
"""

if __name__ == "__main__":
    main()
