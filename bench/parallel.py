"""The unlocked backward on several processes against PyTorch's pipeline schedules for backprop.

python bench/parallel.py actions            # CPU seconds of every forward and backward of VGG-16
python bench/parallel.py sleeping           # the real engines and messages, in stages that sleep for these
python bench/parallel.py equal              # the same, where forward and both gradients take as long
python bench/parallel.py wall --rounds 7    # wall clock of the real net; needs idle cores
python bench/parallel.py report             # bench/results/parallel.md from bench/results/parallel.json

One thread per process; schedules are interleaved, round by round. `sleeping` shows what a machine with a
core for each process would take, on one that is busy or has fewer cores: a stage that sleeps needs none.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from parallel_schedules import Backprop, Direct, Subject, Times, sleeping, vgg16

import feedbackward as fb
from feedbackward.parallel import StageCost, simulate
from feedbackward.parallel.division import divide
from feedbackward.parallel.recording import record
from feedbackward.parallel.segment import StageModule
from feedbackward.parallel.split import find_places

RESULTS = Path(__file__).parent / "results" / "parallel.json"
BATCH, MICRO_BATCHES, STEPS = 128, 4, 10
CUTS = {2: ["block7"], 3: ["block5", "block8"], 4: ["block4", "block7", "block9"]}
RULES = {"bp": fb.BP(), "dfa": fb.DFA(), "dkp": fb.DKP()}
# features of the activity that stages which sleep send on: 2.1 MB in a micro-batch of 32, as VGG-16 does
FEATURES = 16384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["actions", "sleeping", "equal", "wall", "report"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 3, 4])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--parts", type=int, nargs="*", default=[MICRO_BATCHES])
    parser.add_argument("--scale", type=float, default=1.0, help="of the times that stages sleep")
    parser.add_argument("--only", nargs="*", help="schedules to time")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "report":
        from parallel_report import write_report

        print(write_report(json.loads(RESULTS.read_text()), RESULTS.with_suffix(".md")))
        return
    work = {"actions": actions, "sleeping": sleep_all, "equal": sleep_all, "wall": wall}[
        options.what
    ]
    for name, value in work(options).items():
        save(name, {"machine": machine(), **value})


def machine() -> dict[str, Any]:
    """Where and how busy."""
    load = os.getloadavg()[0]
    return {
        "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "load": round(load, 1), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def save(name: str, value: Any) -> None:
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found[name] = value
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(name, json.dumps(value)[:400], flush=True)


def actions(options: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds of the actions of a micro-batch, by number of stages, rule and stage."""
    found = {}
    for ranks in options.ranks:
        subject = vgg16(BATCH // MICRO_BATCHES, CUTS[ranks])
        staged = {rule: Staged(subject, RULES[rule]) for rule in RULES}
        samples: dict[str, list[list[tuple[float, float]]]] = {rule: [] for rule in RULES}
        for _ in range(options.rounds):
            for rule, stages in staged.items():
                samples[rule].append(stages.seconds())
        middle = {
            rule: [
                [statistics.median([s[stage][i] for s in rounds]) for i in (0, 1)]
                for stage in range(ranks)
            ]
            for rule, rounds in samples.items()
        }
        found[f"actions {ranks}"] = {
            "rounds": options.rounds,
            "cut": subject.cut,
            "seconds": middle,
        }
    return found


class Staged:
    """All stages of a net under a rule, in one process."""

    def __init__(self, subject: Subject, rule: fb.Rule) -> None:
        self.subject, self.learner = subject, None
        learner = fb.attach(subject.make(), rule, example=subject.x[:4], sites="layers")
        places, chosen = find_places(learner, subject.x[:4], subject.cut)
        recording = record(learner.model, subject.x[:4], places)
        self.division = divide(learner, recording, tuple(sorted(chosen)), subject.x[:4])
        self.learner = learner

    def seconds(self) -> list[tuple[float, float]]:
        """CPU seconds of the forward and the backward of each stage."""
        modules = [
            StageModule(
                self.learner, self.division.recording, self.division.bounds(i), self.division.routes, i
            )
            for i in range(self.subject.stages)
        ]  # fmt: skip
        passes, forwards, received = [], [], None
        uncut = self.division.routes.uncut
        for stage, module in enumerate(modules):
            if received is not None:
                received = received.detach().requires_grad_(uncut[stage - 1])
            start = time.process_time()
            passes.append(module(self.subject.x, len(self.subject.x), received, None))
            forwards.append(time.process_time() - start)
            received = passes[-1].output
        loss = F.cross_entropy(passes[-1].output, self.subject.y)
        (error,) = torch.autograd.grad(loss, passes[-1].output, retain_graph=True)
        backwards, gradient = [0.0] * len(modules), None
        for stage in reversed(range(len(modules))):
            errors = {source.name: error for source in self.division.routes.graph.sources}
            errors[""] = gradient
            last = stage == len(modules) - 1
            tensors, grads = passes[stage].backward_pairs({} if last else errors)
            start = time.process_time()
            if last:
                tensors, grads = [loss, *tensors], [torch.ones_like(loss), *grads]
            torch.autograd.backward(tensors, grads)
            backwards[stage] = time.process_time() - start
            taken = passes[stage].received
            gradient = None if taken is None else taken.grad
        for module in modules:
            module.remove()
        return list(zip(forwards, backwards, strict=True))


def split_times(what: str, ranks: int) -> list[Times]:
    """Of the saved actions: forward, gradients of inputs (what backprop does more), of weights. Or 0.1
    seconds of each, which is what the multiply-adds of a convolution suggest."""
    if what == "equal":
        return [(0.1, 0.1, 0.1)] * ranks
    found = json.loads(RESULTS.read_text())[f"actions {ranks}"]["seconds"]
    return [
        (min(bp[0], dkp[0]), max(0.0, bp[1] - dkp[1]), dkp[1])
        for bp, dkp in zip(found["bp"], found["dkp"], strict=True)
    ]


def sleep_all(options: argparse.Namespace) -> dict[str, Any]:
    found = {}
    for ranks in options.ranks:
        for parts in options.parts:
            factor = MICRO_BATCHES / parts
            times = [
                tuple(factor * options.scale * t for t in stage)
                for stage in split_times(options.what, ranks)
            ]
            rounds = options.rounds if ranks == 2 else 3
            timed = launch("sleeping", ranks, parts, rounds, options, times)
            costs = [StageCost(*t, sends=FEATURES * BATCH // parts * 4) for t in times]
            sums = {
                name: simulate("star" if name == "dkp" else name, costs, parts) for name in timed
            }
            simulated = {name: [s.isolated, s.steady] for name, s in sums.items()}
            one = parts * sum(map(sum, times))
            found[f"{options.what} {ranks} {parts}"] = {
                "rounds": rounds, "scale": options.scale, "steps": options.steps, "times": times, "seconds": timed,
                "simulated": simulated, "one process": one,
            }  # fmt: skip
    return found


def wall(options: argparse.Namespace) -> dict[str, Any]:
    timed = launch("wall", 2, MICRO_BATCHES, options.rounds, options, None)
    return {"wall 2": {"rounds": options.rounds, "steps": options.steps, "seconds": timed}}


def launch(
    what: str, ranks: int, parts: int, rounds: int, options: argparse.Namespace, times: Any
) -> dict[str, Any]:
    """Seconds per isolated step and per step of several, by schedule, of every round."""
    with tempfile.TemporaryDirectory() as folder:
        # of one micro-batch 1F1B is GPipe
        wanted = options.only or ["gpipe" if parts < ranks else "1f1b", "zero-bubble", "dkp"]
        plan = {
            "what": what,
            "ranks": ranks,
            "parts": parts,
            "rounds": rounds,
            "steps": options.steps,
        }
        mp.spawn(worker, args=(folder, plan, wanted, times), nprocs=ranks)
        return json.loads((Path(folder) / "times.json").read_text())


def worker(rank: int, folder: str, plan: dict[str, Any], wanted: list[str], times: Any) -> None:
    torch.set_num_threads(1)
    wait = timedelta(seconds=900)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=plan["ranks"],
        timeout=wait,
    )
    subject = vgg16(BATCH, CUTS[plan["ranks"]])
    if plan["what"] == "sleeping":
        subject = sleeping(times, BATCH, FEATURES)
    subjects = {
        name: Direct(subject, RULES[name], plan["parts"], 900)
        if name in RULES
        else Backprop(subject, name, plan["parts"])
        for name in wanted
    }
    found: dict[str, Any] = {name: {"isolated": [], "steady": []} for name in wanted}
    for kind, steps in (
        ("warm", 1),
        *((k, s) for _ in range(plan["rounds"]) for k, s in _kinds(plan)),
    ):
        for name, timed in subjects.items():
            dist.barrier()
            start = time.perf_counter()
            for _ in range(steps):
                timed.step()
            dist.barrier()
            if kind != "warm":
                found[name][kind].append((time.perf_counter() - start) / steps)
    if rank == 0:
        (Path(folder) / "times.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)


def _kinds(plan: dict[str, Any]) -> list[tuple[str, int]]:
    return [("isolated", 1), ("steady", plan["steps"])] if plan["steps"] > 1 else [("isolated", 1)]


if __name__ == "__main__":
    main()
