"""bench/results/parallel.md from the numbers that bench/parallel.py saved."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

NAMES = {
    "gpipe": "backprop, GPipe",
    "1f1b": "backprop, 1F1B",
    "zero-bubble": "backprop, zero bubble",
    "dfa": "DFA, fb.parallel",
    "dkp": "DKP, fb.parallel",
}


def write_report(found: dict[str, Any], path: Path) -> str:
    """Write the tables; returns the summary, which is the last line."""
    lines = ["# The unlocked backward on several processes", ""]
    lines += [
        "VGG-16 with batch norm, images of 32 x 32, batch 128, one thread per process, gloo on one machine. "
        "Made by `bench/parallel.py`; `python bench/parallel.py report` writes this page.",
        "",
    ]
    for key, value in found.items():
        kind, _, rest = key.partition(" ")
        lines += {"actions": _actions, "sleeping": _engine, "equal": _engine, "wall": _engine}[
            kind
        ](kind, rest.split(), value)
    summary = _summary(found)
    path.write_text("\n".join([*lines, summary]) + "\n")
    return summary


def _machine(value: dict[str, Any]) -> str:
    m = value["machine"]
    return f"{m['cores']} cores ({m['cpu']}), load {m['load']} at the end, torch {m['torch']}, {m['date']}"


def _actions(kind: str, rest: list[str], value: dict[str, Any]) -> list[str]:
    stages = int(rest[0])
    lines = [
        f"## CPU time of the actions of a micro-batch of 32, {stages} stages", "",
        f"Cut after {', '.join(value['cut'])}; ms of forward / backward, n = {value['rounds']} interleaved rounds. {_machine(value)}. "
        "On a busy machine caches and cores are shared, which lengthens CPU time too, and unevenly.",
        "", "| rule | " + " | ".join(f"stage {i}" for i in range(stages)) + " | sum |",
        "|---|" + "---|" * (stages + 1),
    ]  # fmt: skip
    for rule, parts in value["seconds"].items():
        cells = [f"{1000 * f:.0f} / {1000 * b:.0f}" for f, b in parts]
        lines.append(f"| {rule} | {' | '.join(cells)} | {1000 * sum(map(sum, parts)):.0f} |")
    return [*lines, ""]


def _engine(kind: str, rest: list[str], value: dict[str, Any]) -> list[str]:
    ranks, parts = rest[0], rest[1] if len(rest) > 1 else "4"
    what = {
        "sleeping": "stages that sleep for the CPU times above",
        "equal": "stages that sleep equally long for forward, input and weight gradients",
        "wall": "wall clock of the real net",
    }[kind]
    lines = [
        f"## {ranks} processes, {parts} micro-batches: {what}", "",
        f"n = {value['rounds']} interleaved rounds of one step between barriers, and of {value['steps']} steps without; ms per step, "
        f"mean ± standard deviation (least, median); the last column is the median of the ratios of the same rounds, "
        f"and the ratio of the least. {_machine(value)}.",
        "", "| | one step | simulated | per step of several | simulated | 1F1B / it |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    seconds = value["seconds"]
    reference = "1f1b" if "1f1b" in seconds else "gpipe"
    for name, times in seconds.items():
        made = value.get("simulated", {}).get(name, [None, None])
        cells = []
        for times_of, simulated in zip((times["isolated"], times["steady"]), made, strict=True):
            cells += [_spread(times_of), "-" if simulated is None else f"{1000 * simulated:.0f}"]
        pairs = [_ratio(seconds, reference, name, k) for k in ("isolated", "steady")]
        lines.append(
            f"| {NAMES[name]} | {' | '.join(cells)} | {' , '.join(p for p in pairs if p)} |"
        )
    if "one process" in value:
        one = value["one process"]
        dkp = statistics.median(seconds["dkp"]["steady"])
        lines += [
            "",
            f"One process of backprop: {1000 * one:.0f} ms; DKP over several steps is {one / dkp:.2f} times as fast.",
        ]
    return [*lines, ""]


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    mean, least, middle = statistics.mean(values), min(values), statistics.median(values)
    return f"{1000 * mean:.0f} ± {1000 * deviation:.0f} ({1000 * least:.0f}, {1000 * middle:.0f})"


def ratio(seconds: dict[str, Any], reference: str, name: str, kind: str) -> float | None:
    """The median of the ratios of the same rounds."""
    pairs = list(zip(seconds[reference][kind], seconds[name][kind], strict=True))
    return statistics.median(a / b for a, b in pairs) if pairs else None


def _ratio(seconds: dict[str, Any], reference: str, name: str, kind: str) -> str:
    found = ratio(seconds, reference, name, kind)
    least = min(seconds[reference][kind]) / min(seconds[name][kind]) if found else 0.0
    return "" if found is None else f"{found:.2f} ({least:.2f})"


def _summary(found: dict[str, Any]) -> str:
    parts, worst = [], 0.0
    for key, value in found.items():
        if "seconds" not in value or "dkp" not in value["seconds"] or key.startswith("actions"):
            continue
        seconds = value["seconds"]
        told = []
        for other in ("1f1b", "gpipe", "zero-bubble"):
            if other in seconds:
                pair = [ratio(seconds, other, "dkp", kind) for kind in ("isolated", "steady")]
                told.append(f"{other} {' / '.join(f'{r:.2f}' for r in pair if r)}")
        parts.append(f"{key}: {', '.join(told)}")
        for name, (isolated, steady) in value.get("simulated", {}).items():
            for kind, made in (("isolated", isolated), ("steady", steady)):
                if seconds[name][kind]:
                    measured = statistics.median(seconds[name][kind])
                    worst = max(worst, abs(measured / made - 1))
    text = "; ".join(parts)
    return (
        f"Summary: how many times as fast DKP is, one step / several. {text}. Simulated and measured differ by at "
        f"most {100 * worst:.0f} %."
    )
