"""bench/results/parallel.md from the numbers that bench/parallel.py saved."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from parallel_schedules import OWN

NAMES = {
    "gpipe": "backprop, GPipe (of one micro-batch, 1F1B is the same)",
    "1f1b": "backprop, 1F1B",
    "zero-bubble": "backprop, zero bubble",
    "dkp": "DKP, fb.parallel",
    "bp alone": "backprop, one process",
    "dkp alone": "DKP, one process",
    "bp ddp": "backprop, DDP",
    "dkp ddp": "DKP, DDP",
    "dkp-plain": "DKP without whitening, fb.parallel",
    "dkp-plain ddp": "DKP without whitening, DDP",
}
TITLES = {
    "vgg16": "VGG-16, batch 128, 4 micro-batches",
    "vgg16 one": "VGG-16, batch 128, one micro-batch",
    "vgg16 link": "VGG-16, batch 128, 4 micro-batches, two hosts on a link",
    "transformer": "Transformer of 8 blocks, width 256, 32 tokens, batch 64, 4 micro-batches, a site at the end of each block",
    "inside": "The same transformer, with sites in the blocks too, at the inputs of all Linear modules",
}
ISOLATED, STEADY = "isolated", "steady"
# group, against what, in which of its times and of DKP's, how much faster DKP's pipeline was to be
BARS: list[tuple[str, str, str, str, float | None]] = [
    ("vgg16", "1f1b", ISOLATED, ISOLATED, 1.45),
    ("vgg16", "1f1b", STEADY, STEADY, 1.55),
    ("vgg16", "zero-bubble", ISOLATED, ISOLATED, None),
    ("vgg16", "zero-bubble", STEADY, STEADY, 1.3),
    ("vgg16", "bp alone", ISOLATED, STEADY, 2.2),
    ("vgg16", "bp ddp", ISOLATED, STEADY, None),
    ("vgg16", "dkp ddp", ISOLATED, STEADY, None),
    ("vgg16 one", "gpipe", ISOLATED, ISOLATED, None),
    ("vgg16 one", "gpipe", STEADY, STEADY, 1.7),
    ("vgg16 one", "zero-bubble", STEADY, STEADY, None),
    ("vgg16 link", "bp ddp", ISOLATED, STEADY, 2.0),
    ("vgg16 link", "dkp ddp", ISOLATED, STEADY, None),
    ("vgg16 link", "1f1b", STEADY, STEADY, None),
    *(
        (net, *row)
        for net in ("transformer", "inside")
        for row in (
            ("1f1b", ISOLATED, ISOLATED, 1.45),
            ("1f1b", STEADY, STEADY, 1.55),
            ("zero-bubble", STEADY, STEADY, 1.3),
            ("bp alone", ISOLATED, STEADY, 2.2),
            ("bp ddp", ISOLATED, STEADY, None),
            (f"{OWN[net]} ddp", ISOLATED, STEADY, None),
        )
    ),
]


def write_report(found: dict[str, Any], path: Path) -> str:
    """Write the tables; returns the summary, which is the last line."""
    lines = [
        "# The unlocked backward on several processes", "",
        "Two processes of one thread each, gloo on one machine; SGD with momentum, its step included. VGG-16 has batch "
        "norm and images of 32 x 32. `python bench/parallel.py` makes this page; `python bench/parallel.py report` only writes it.",
        "", "## DKP in a pipeline, against", "",
        "The median of the ratios of the same rounds (least, most). `one step` is between barriers, `many` the mean of several "
        "steps without; steps of one process and of DDP do not overlap. Without a bar, the row is for comparison. "
        "[A picture](../../docs/timelines.png) shows what each process does, and why the missed bars are missed.", "",
        "| net | against | times | DKP is faster by | bar |", "|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [_bar_row(found, *bar) for bar in BARS if _has(found, bar[0], bar[1])]
    lines.append("")
    for key, value in found.items():
        kind = key.split()[0]
        if kind == "actions":
            lines += _actions(key, value)
        elif kind == "sleeping":
            lines += _sleeping(key, value)
        else:
            lines += _group(found, key, value)
    summary = _summary(found)
    path.write_text("\n".join([*lines, summary]) + "\n")
    return summary


def _has(found: dict[str, Any], group: str, other: str) -> bool:
    return other in found.get(group, {}).get("seconds", {})


def ratios(found: dict[str, Any], group: str, other: str, theirs: str, own: str) -> list[float]:
    """Of every round, how many times as fast DKP's pipeline is."""
    seconds = found[group]["seconds"]
    return [
        a / b
        for a, b in zip(seconds[other][theirs], seconds[OWN[group.split()[0]]][own], strict=True)
    ]


def _bar_row(
    found: dict[str, Any], group: str, other: str, theirs: str, own: str, bar: float | None
) -> str:
    made = ratios(found, group, other, theirs, own)
    words = {ISOLATED: "one step", STEADY: "many"}
    kinds = words[own] if theirs == own else f"{words[theirs]} / {words[own]}"
    middle = statistics.median(made)
    verdict = "" if bar is None else f"{bar:g}: {'met' if middle >= bar else 'missed'}"
    return f"| {TITLES[group]} | {NAMES[other]} | {kinds} | {middle:.2f} ({min(made):.2f}, {max(made):.2f}) | {verdict} |"


def _machine(value: dict[str, Any]) -> str:
    m = value["machine"]
    return f"{m['cores']} cores ({m['cpu']}), load {m['load']} at the end, torch {m['torch']}, {m['date']}"


def _group(found: dict[str, Any], key: str, value: dict[str, Any]) -> list[str]:
    if "not run" in value:
        return [f"## {TITLES[key]}", "", f"Not run: {value['not run']}.", ""]
    link = (
        f" Each host sends at most {value['mbit']:g} Mbit/s (network namespaces, `tc tbf`)."
        if value.get("mbit")
        else ""
    )
    lines = [
        f"## {TITLES[key]}", "",
        f"n = {value['rounds']} interleaved rounds of one step between barriers, and of {value['steps']} steps without; ms per "
        f"step, median (least, most).{link} {_machine(value)}.", "",
        "| | one step | per step of many | simulated | back per step |", "|---|---|---|---|---|",
    ]  # fmt: skip
    made = _simulated(found, key, value)
    for name, times in value["seconds"].items():
        told = " / ".join(f"{1000 * t:.0f}" for t in made.get(name, []))
        lines.append(
            f"| {NAMES[name]} | {_spread(times[ISOLATED])} | {_spread(times[STEADY])} | {told or '-'} | {_back(value, name)} |"
        )
    return [*lines, "", "", *_why(found, key, made)]


def _simulated(found: dict[str, Any], key: str, value: dict[str, Any]) -> dict[str, Any]:
    """From the CPU time of the actions, where the micro-batches are as large as these were."""
    if f"actions {key} 2" not in found:
        return {}
    from parallel import simulated, split_times

    steps = value["steps"]
    who, own = list(value["seconds"]), OWN[key.split()[0]]
    return simulated(split_times(found, key, 2), who, value["parts"], 0, steps, own)


def _why(found: dict[str, Any], key: str, made: dict[str, Any]) -> list[str]:
    """What the machine allows: how long each rank computes in a step."""
    if not made:
        return []
    actions = found[f"actions {key} 2"]["cpu seconds"]
    rule = OWN[key.split()[0]]
    own, theirs = ([4 * sum(stage) for stage in actions[name]] for name in (rule, "bp"))
    allowed = " and ".join(
        f"{made['1f1b'][i] / made[rule][i]:.2f} ({words})"
        for i, words in enumerate(("one step", "many"))
    )
    return [
        f"By the CPU time of its actions, DKP computes {' and '.join(f'{1000 * t:.0f}' for t in own)} ms on the two ranks in a "
        f"step, and backprop {' and '.join(f'{1000 * t:.0f}' for t in theirs)} ms: net of the cost of feedback, DKP does without "
        f"{100 * (1 - sum(own) / sum(theirs)):.0f} % of backprop's work on this machine. So it can be {allowed} times as fast as "
        "1F1B here.",
        "",
    ]


def _back(value: dict[str, Any], name: str) -> str:
    """Bytes that travel for the backward passes."""
    counted = value.get("bytes in backward", {}).get(name)
    told = [] if counted is None else [f"{counted / 1000:.1f} kB received for backward passes"]
    sent = value.get("bytes sent by rank", {}).get(name)
    if sent:
        told.append(f"{' and '.join(f'{n / 1e6:.2f}' for n in sent)} MB sent by the hosts")
    return "; ".join(told) or "-"


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    middle, least, most = statistics.median(values), min(values), max(values)
    return f"{1000 * middle:.0f} ({1000 * least:.0f}, {1000 * most:.0f})"


def _actions(key: str, value: dict[str, Any]) -> list[str]:
    stages = len(value["cut"]) + 1
    lines = [
        f"## CPU time of the actions of a micro-batch: {key.split()[1]}, {stages} stages", "",
        f"Cut after {', '.join(value['cut'])}; ms of forward / backward, median of {value['rounds']}. {_machine(value)}.", "",
        "| rule | " + " | ".join(f"stage {i}" for i in range(stages)) + " | sum |",
        "|---|" + "---|" * (stages + 1),
    ]  # fmt: skip
    for rule, parts in value["cpu seconds"].items():
        cells = [f"{1000 * f:.0f} / {1000 * b:.0f}" for f, b in parts]
        lines.append(f"| {rule} | {' | '.join(cells)} | {1000 * sum(map(sum, parts)):.0f} |")
    return [*lines, ""]


def _sleeping(key: str, value: dict[str, Any]) -> list[str]:
    lines = [
        f"## The simulator against {key.split()[1]} processes that sleep", "",
        f"The real engines and messages, in stages that sleep for the CPU times above, scaled. n = {value['rounds']}; ms, "
        f"median (least, most). {_machine(value)}.", "",
        "| | one step | simulated | per step of many | simulated |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for name, times in value["seconds"].items():
        isolated, steady = value["simulated"][name]
        lines.append(
            f"| {NAMES[name]} | {_spread(times[ISOLATED])} | {1000 * isolated:.0f} | {_spread(times[STEADY])} | {1000 * steady:.0f} |"
        )
    return [*lines, ""]


def deviations(found: dict[str, Any]) -> list[float]:
    """How far the simulator is from the medians measured: of stages that sleep, and of the real nets."""
    parts = []
    for key, value in found.items():
        made = value.get("simulated") or (
            _simulated(found, key, value) if "seconds" in value else {}
        )
        for name, expected in made.items():
            for kind, seconds in zip((ISOLATED, STEADY), expected, strict=True):
                measured = value["seconds"][name][kind]
                if measured:
                    parts.append(abs(statistics.median(measured) / seconds - 1))
    return parts


def _summary(found: dict[str, Any]) -> str:
    told = []
    for group, other, theirs, own, bar in BARS:
        if bar is not None and _has(found, group, other):
            middle = statistics.median(ratios(found, group, other, theirs, own))
            told.append(f"{group} against {other}, {own} {middle:.2f} (bar {bar:g})")
    off = deviations(found)
    worst = (
        f" Simulated and measured differ by at most {100 * max(off):.0f} %, {100 * statistics.median(off):.0f} % in the middle."
        if off
        else ""
    )
    return f"Summary: how many times as fast a pipeline with DKP is. {'; '.join(told)}.{worst}"


COLOURS = {"forward": "#9db8d2", "backward": "#d55e00", "weights": "#e8a86a"}
MEANINGS = {
    "forward": "forward",
    "backward": "backward (of zero bubble: gradients of inputs)",
    "weights": "gradients of weights, of zero bubble",
}


def plot_timelines(path: Path, panels: list[tuple[str, dict[str, Any]]]) -> None:
    """Of each net a panel: what every process did in three steps, one schedule above the other on the same axis of time."""
    rows = [sum(len(ranks) + 0.7 for ranks in found.values()) for _, found in panels]
    figure = Figure(figsize=(11, 0.26 * sum(rows) + 0.9 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, height_ratios=rows)
    for axis, (name, found) in zip(axes, panels, strict=True):
        at, ticks = 0.0, []
        for schedule, ranks in found.items():
            begin = min(event[3] for events in ranks for event in events)
            end = max(event[4] for events in ranks for event in events) - begin
            for rank, events in enumerate(ranks):
                for what, _, index, start, stop in events:
                    if what in COLOURS:
                        axis.barh(
                            at,
                            stop - start,
                            0.85,
                            left=start - begin,
                            color=COLOURS[what],
                            ec="white",
                            lw=0.4,
                        )
                        if stop - start > end / 60:
                            axis.text(
                                (start + stop) / 2 - begin,
                                at,
                                str(index),
                                ha="center",
                                va="center",
                                size=6,
                            )
                ticks.append((at, f"{NAMES[schedule].split(' (')[0]}, {rank}"))
                at += 1
            works = sum(
                stop - start
                for events in ranks
                for what, *_, start, stop in events
                if what in COLOURS
            )
            text = f"  {end:.2f} s\n  busy {works / end / len(ranks):.0%}"
            axis.text(end, at - 1.5, text, va="center", size=8)
            at += 0.7
        axis.set_yticks(*zip(*ticks, strict=True), size=8)
        axis.set_title(TITLES[name], size=9, loc="left")
        axis.set_ylim(at - 0.7, -0.8)
        axis.margins(x=0.08)
        axis.spines[["top", "right", "left"]].set_visible(False)
    axes[-1].set_xlabel("seconds, three steps without a barrier")
    for what, colour in COLOURS.items():
        axes[0].barh(0, 0, color=colour, label=MEANINGS[what])
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
