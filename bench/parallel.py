"""The unlocked backward on several processes against backprop: PyTorch's pipeline schedules, its data parallelism, one process.

python bench/parallel.py                       # everything, with two idle cores some 12 minutes; needs root for the slow link
python bench/parallel.py --rounds 3 --only vgg16
python bench/parallel.py report                # bench/results/parallel.md from bench/results/parallel.json
python bench/parallel.py timeline --picture timeline.png

One thread per process. What is compared is interleaved, round by round, and the medians of the ratios of the same
rounds count. Stages that sleep show what a machine with a core for each process would take: they need no core.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from hosts import Hosts, bytes_sent, processes, why_not
from parallel_report import plot_timelines, write_report
from parallel_schedules import OWN, RULES, SUBJECTS, Subject, Times, contestant, sleeping

import feedbackward as fb
from feedbackward.parallel import StageCost, simulate
from feedbackward.parallel.division import divide
from feedbackward.parallel.recording import record
from feedbackward.parallel.segment import StageModule
from feedbackward.parallel.split import find_places

RESULTS = Path(__file__).parent / "results" / "parallel.json"
BATCH = {"vgg16": 128, "transformer": 64, "inside": 64}
MICRO_BATCHES, STEPS = 4, 10
CUTS = {
    "vgg16": {2: ["block7"], 3: ["block5", "block8"], 4: ["block4", "block7", "block9"]},
    "transformer": {2: ["block4"]},
    "inside": {2: ["block4"]},
}
# features of the activity that stages which sleep send on: 2.1 MB in a micro-batch of 32, as VGG-16 does
FEATURES = 16384
MBIT = 100.0
# how long a group of processes may take
LONGEST = 1800.0
PIPELINES = ["1f1b", "zero-bubble", "dkp"]
# of whose steps fewer are made without a barrier, to save time
FEWER = {"zero-bubble": 3}
# what is timed side by side: net, micro-batches, those compared, and the part of the rounds
GROUPS: dict[str, dict[str, Any]] = {
    "vgg16": {
        "parts": 4,
        "who": [*PIPELINES, "dkp-plain", "bp alone", "dkp alone", "bp ddp", "dkp ddp"],
    },
    "vgg16 one": {"parts": 1, "who": ["gpipe", "zero-bubble", "dkp"], "steps": 2, "part": 0.4},
    "vgg16 link": {
        "parts": 4,
        "who": ["1f1b", "dkp", "bp ddp", "dkp ddp"],
        "steps": 2,
        "part": 0.4,
    },
    "transformer": {
        "parts": 4,
        "who": [*PIPELINES, "bp alone", "dkp alone", "bp ddp", "dkp ddp"],
        "steps": 5,
    },
    "inside": {
        "parts": 4,
        "who": ["1f1b", "zero-bubble", "dkp-plain", "dkp", "bp alone", "bp ddp", "dkp-plain ddp"],
        "steps": 5,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "what", nargs="?", default="all", choices=["all", "report", "timeline", "worker"]
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--only", nargs="*", help=f"of {', '.join(GROUPS)}, actions, sleeping")
    parser.add_argument("--scale", type=float, default=0.5, help="of the times that stages sleep")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--picture", type=Path, default=Path("timeline.png"))
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "worker":
        worker(options.folder)
    elif options.what == "timeline":
        timelines(options.picture)
    else:
        if options.what == "all":
            measure(options)
        print(
            write_report(
                json.loads(options.results.read_text()), options.results.with_suffix(".md")
            )
        )


def measure(options: argparse.Namespace) -> None:
    """Time everything that was asked for, and save it."""
    wanted = options.only or ["actions", *GROUPS, "sleeping"]
    if not options.only:
        options.results.unlink(missing_ok=True)
    for name in wanted:
        started = time.monotonic()
        if name == "actions":
            found = actions(max(3, options.rounds // 2))
        elif name == "sleeping":
            found = sleep_all(options)
        else:
            found = {name: group(name, options)}
        for key, value in found.items():
            save(options.results, key, {"machine": machine(), **value})
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)


def group(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The rounds of a group."""
    chosen = GROUPS[name]
    rounds = max(1, round(options.rounds * chosen.get("part", 1.0)))
    plan = {
        "net": name.split()[0], "ranks": 2, "rounds": rounds, "steps": min(options.steps, chosen.get("steps", options.steps)),
        **{key: chosen[key] for key in ("parts", "who")},
    }  # fmt: skip
    if "link" not in name:
        return {**plan, **launch(plan)}
    why = why_not()
    return {**plan, "not run": why} if why else {**plan, "mbit": MBIT, **launch(plan, MBIT)}


def machine() -> dict[str, Any]:
    """Where and how busy."""
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if "model name" in line]
    return {
        "cpu": names[0] if names else platform.machine(), "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def save(path: Path, name: str, value: Any) -> None:
    found = json.loads(path.read_text()) if path.exists() else {}
    found[name] = value
    path.write_text(json.dumps(found, indent=1) + "\n")


def actions(rounds: int) -> dict[str, Any]:
    """CPU seconds of the actions of a micro-batch, by number of stages, rule and stage."""
    found = {}
    for net, cuts in CUTS.items():
        for ranks, cut in cuts.items():
            subject = SUBJECTS[net](BATCH[net] // MICRO_BATCHES, cut)
            staged = {rule: Staged(subject, RULES[rule]) for rule in ("bp", OWN[net])}
            samples: dict[str, list[Any]] = {rule: [] for rule in staged}
            for _ in range(rounds):
                for rule, stages in staged.items():
                    samples[rule].append(stages.seconds())
            middle = {
                rule: [[statistics.median(s[stage][i] for s in rounds) for i in (0, 1)] for stage in range(ranks)]
                for rule, rounds in samples.items()
            }  # fmt: skip
            found[f"actions {net} {ranks}"] = {"rounds": rounds, "cut": cut, "cpu seconds": middle}
    return found


class Staged:
    """All stages of a net under a rule, in one process."""

    def __init__(self, subject: Subject, rule: fb.Rule) -> None:
        self.subject = subject
        self.learner = fb.attach(subject.make(), rule, example=subject.x[:4], sites=subject.sites)
        with torch.no_grad():
            for B in self.learner.feedback.parameters():
                B.normal_()  # as after some steps: it begins at zero
        places, chosen = find_places(self.learner, subject.x[:4], subject.cut)
        recording = record(self.learner.model, subject.x[:4], places)
        self.division = divide(self.learner, recording, tuple(sorted(chosen)), subject.x[:4])
        self.seconds()

    def seconds(self) -> list[tuple[float, float]]:
        """CPU seconds of the forward and the backward of each stage."""
        routes, count = self.division.routes, self.subject.stages
        modules = [
            StageModule(self.learner, self.division.recording, self.division.bounds(i), routes, i)
            for i in range(count)
        ]
        passes, forwards, received = [], [], None
        for stage, module in enumerate(modules):
            if received is not None:
                received = received.detach().requires_grad_(routes.uncut[stage - 1])
            start = time.process_time()
            passes.append(module(self.subject.x, len(self.subject.x), received, None))
            forwards.append(time.process_time() - start)
            received = passes[-1].output
        loss = F.cross_entropy(passes[-1].output, self.subject.y)
        (error,) = torch.autograd.grad(loss, passes[-1].output, retain_graph=True)
        backwards, gradient = [0.0] * count, None
        for stage in reversed(range(count)):
            errors = {source.name: error for source in routes.graph.sources}
            errors[""] = gradient
            last = stage == count - 1
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


def split_times(saved: dict[str, Any], net: str, ranks: int) -> list[Times]:
    """Of the saved actions: forward, gradients of inputs (what backprop does more), of weights."""
    found = saved[f"actions {net} {ranks}"]["cpu seconds"]
    return [
        (min(bp[0], dkp[0]), max(0.0, bp[1] - dkp[1]), dkp[1])
        for bp, dkp in zip(found["bp"], found[OWN[net]], strict=True)
    ]


def simulated(
    times: list[Times], who: list[str], parts: int, sends: int, steps: int, own: str = "dkp"
) -> dict[str, list[float]]:
    """What the simulator says of one step, and of one of so many without a barrier."""
    costs = [StageCost(*t, sends=sends) for t in times]
    known = {"1f1b": "1f1b", "gpipe": "gpipe", "zero-bubble": "zero-bubble", own: "star"}
    made = {w: simulate(known[w], costs, parts) for w in who if w in known}  # type: ignore[arg-type]
    return {
        name: [s.isolated, (s.isolated + (steps - 1) * s.steady) / steps]
        for name, s in made.items()
    }


def timelines(picture: Path) -> None:
    """A picture of what DKP's pipeline and PyTorch's schedules do, for each net of which a bar is missed."""
    panels = []
    for name in ("vgg16", "vgg16 one", "transformer", "inside"):
        chosen = GROUPS[name]
        stock = [each for each in chosen["who"] if each in ("1f1b", "gpipe", "zero-bubble")]
        who = [*stock, OWN[name.split()[0]]]
        plan = {
            "net": name.split()[0],
            "ranks": 2,
            "parts": chosen["parts"],
            "who": who,
            "traced": 3,
        }
        panels.append((name, launch(plan)))
        print(name, flush=True)
    picture.with_suffix(".json").write_text(json.dumps(panels))
    plot_timelines(picture, panels)


def sleep_all(options: argparse.Namespace) -> dict[str, Any]:
    """The real engines and messages on 2, 3 and 4 processes, in stages that sleep for the measured times."""
    saved, found = json.loads(options.results.read_text()), {}
    for ranks in CUTS["vgg16"]:
        times = [
            tuple(options.scale * t for t in stage) for stage in split_times(saved, "vgg16", ranks)
        ]
        plan = {
            "net": "sleeping", "ranks": ranks, "parts": MICRO_BATCHES, "rounds": 2, "steps": 3,
            "who": PIPELINES, "times": times,
        }  # fmt: skip
        sends = FEATURES * BATCH["vgg16"] // MICRO_BATCHES * 4
        made = simulated(times, PIPELINES, MICRO_BATCHES, sends, plan["steps"])  # type: ignore[arg-type]
        found[f"sleeping {ranks}"] = {**plan, "simulated": made, **launch(plan)}
    return found


def launch(plan: dict[str, Any], mbit: float | None = None) -> dict[str, Any]:
    """Run the plan on its ranks, in this machine's network or on hosts with a link of this speed."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "plan.json").write_text(json.dumps({**plan, "mbit": mbit}))
        own = [sys.executable, __file__, "worker", "--folder", folder]
        environments = [
            {"RANK": str(rank), "OMP_NUM_THREADS": "1"} for rank in range(plan["ranks"])
        ]
        if mbit is None:
            return _outcome(folder, [own] * plan["ranks"], environments)
        with Hosts(plan["ranks"], mbit) as hosts:
            commands = [[*hosts.inside(rank), *own] for rank in range(plan["ranks"])]
            there = [{**each, "GLOO_SOCKET_IFNAME": "eth0"} for each in environments]
            return _outcome(folder, commands, there)


def _outcome(
    folder: str, commands: list[list[str]], environments: list[dict[str, str]]
) -> dict[str, Any]:
    with processes(commands, environments) as running:
        try:
            told = [process.communicate(timeout=LONGEST)[0] for process in running]
        except subprocess.TimeoutExpired:
            raise SystemExit(f"the processes took more than {LONGEST:g} s") from None
    path = Path(folder) / "times.json"
    if not path.exists():
        raise SystemExit("a process has failed:\n" + "\n".join(text[-3000:] for text in told))
    return json.loads(path.read_text())


def worker(folder: Path) -> None:
    """One rank: time those compared, round by round."""
    plan, rank = json.loads((folder / "plan.json").read_text()), int(os.environ["RANK"])
    wait = timedelta(seconds=900)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=plan["ranks"],
        timeout=wait,
    )
    if plan["net"] == "sleeping":
        subject = sleeping([tuple(t) for t in plan["times"]], BATCH["vgg16"], FEATURES)
    else:
        subject = SUBJECTS[plan["net"]](BATCH[plan["net"]], CUTS[plan["net"]][plan["ranks"]])
    found = _traced(plan, subject, folder) if "traced" in plan else _timed(plan, subject)
    if rank == 0:
        (folder / "times.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)


def _timed(plan: dict[str, Any], subject: Subject) -> dict[str, Any]:
    them = {name: contestant(name, subject, plan["parts"]) for name in plan["who"]}
    seconds: dict[str, Any] = {name: {"isolated": [], "steady": []} for name in them}
    wire: dict[str, Any] = {}
    for turn in range(plan["rounds"] + 1):
        for kind in ("isolated", "steady"):
            for name, one in them.items():
                # only a pipeline's steps overlap
                if kind == "steady" and (turn == 0 or name.endswith((" alone", " ddp"))):
                    continue
                steps = (
                    1 if kind == "isolated" else min(plan["steps"], FEWER.get(name, plan["steps"]))
                )
                took, sent = _steps(one, steps, plan["mbit"] is not None)
                if turn:
                    seconds[name][kind].append(took)
                    wire.setdefault(name, sent)
    back: list[Any] = [None] * plan["ranks"]
    dist.all_gather_object(back, {name: one.received for name, one in them.items()})
    made = plan["rounds"] * (1 + plan["steps"]) + 1
    bytes_back = {
        name: max(each[name] for each in back) // made for name in them if back[0][name] is not None
    }
    out: list[Any] = [None] * plan["ranks"]
    dist.all_gather_object(out, wire)
    sent_by = {name: [each[name] for each in out] for name in wire} if plan["mbit"] else {}
    return {"seconds": seconds, "bytes in backward": bytes_back, "bytes sent by rank": sent_by}


def _steps(one: Any, steps: int, counted: bool) -> tuple[float, int]:
    """Seconds per step, and what this host's interface sent meanwhile."""
    dist.barrier()
    before, start = bytes_sent() if counted else 0, time.perf_counter()
    for _ in range(steps):
        one.step()
    dist.barrier()
    took = (time.perf_counter() - start) / steps
    return took, (bytes_sent() - before) // steps if counted else 0


def _traced(plan: dict[str, Any], subject: Subject, folder: Path) -> dict[str, Any]:
    """What each rank did in one step, and in two more without a barrier."""
    found = {}
    for name in plan["who"]:
        one = contestant(name, subject, plan["parts"])
        one.step()
        dist.barrier()
        found[name] = one.traced(plan["traced"], folder)
        dist.barrier()
    return found


if __name__ == "__main__":
    main()
