"""What a pipeline of any size would take: every rank works through its list of actions in order,
and an action begins when the rank is free and what it needs has arrived."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from feedbackward.errors import ConfigError

Schedule = Literal["gpipe", "1f1b", "zero-bubble", "star", "star-few", "highway", "relays", "local"]
SCHEDULES: tuple[Schedule, ...] = (
    "gpipe", "1f1b", "zero-bubble", "star", "star-few", "highway", "relays", "local"
)  # fmt: skip
_BACKPROP = ("gpipe", "1f1b", "zero-bubble")


@dataclass(frozen=True)
class StageCost:
    """Of one stage, for one micro-batch: seconds of the forward, of the gradients of inputs and of
    weights; seconds of the update, once per step; bytes of the activity that it sends on, and of
    what it holds between a micro-batch's forward and backward.

    Example:
        >>> import feedbackward as fb
        >>> stage = fb.parallel.StageCost(forward=1.0, inputs=0.7, weights=1.2)
        >>> one = fb.parallel.simulate("gpipe", [stage], micro_batches=4)
        >>> round(one.steady, 1)  # a single stage computes all the time
        11.6
    """

    forward: float
    inputs: float
    weights: float
    update: float = 0.0
    sends: int = 0
    holds: int = 0


@dataclass(frozen=True)
class Link:
    """Between two ranks, each way: bytes per second, and seconds until the first byte arrives.

    Example:
        >>> import feedbackward as fb
        >>> fb.parallel.Link(bandwidth=1e9).seconds(2_000_000)
        0.002
    """

    bandwidth: float = math.inf
    latency: float = 0.0

    def seconds(self, size: int) -> float:
        """How long it is busy with a message."""
        return size / self.bandwidth


@dataclass(frozen=True)
class Simulated:
    """Attributes:
    isolated: seconds of one step between barriers. steady: seconds per step of many steps
        without a barrier.
    bubble: the part of the ranks' time, in steady steps, in which they do nothing.
    backward_bytes: bytes that arrive at a rank for its backward passes in a step, at most.
    forward_bytes: bytes of activities that arrive at a rank in a step, at most.
    held: by rank, the most bytes of activities held at once.

    Example:
        >>> import feedbackward as fb
        >>> stages = [fb.parallel.StageCost(forward=1.0, inputs=0.7, weights=1.2)] * 4
        >>> fb.parallel.simulate("star", stages, micro_batches=8).backward_bytes  # no error_bytes given
        0
    """

    isolated: float
    steady: float
    bubble: float
    forward_bytes: int
    backward_bytes: int
    held: tuple[int, ...]


# kind ("F", "B": all of the backward or that of the inputs, "W", "U": the update), micro-batch
Action = tuple[str, int]
# kind, stage, micro-batch, step
Key = tuple[str, int, int, int]


def simulate(
    schedule: Schedule,
    stages: Sequence[StageCost],
    micro_batches: int,
    *,
    links: Link | Sequence[Link] = Link(),
    error_bytes: int = 0,
    relays: int = 4,
    steps: int = 8,
) -> Simulated:
    """The time of a step of a pipeline of these stages.

    schedule: `"gpipe"`, `"1f1b"`, `"zero-bubble"` (ZB1P) of backprop; `"star"`: the last rank sends
    the error to every rank, forwards first, and runs backwards while it waits for an input;
    `"star-few"`: the same, one forward and one backward in turn; `"highway"`: the error goes from
    rank to rank, but waits for no computation; `"relays"`:
    so many ranks send on an error of their own, of the size of their activity; `"local"`: no message
    back at all. links: one for all, or one for each pair of neighbours. error_bytes: of the error of
    a micro-batch.

    Raises ConfigError for an unknown schedule or numbers out of range.

    Example:
        >>> from feedbackward.parallel import StageCost, simulate
        >>> stages = [StageCost(forward=1.0, inputs=0.7, weights=1.2)] * 4
        >>> one_after_another, at_once = simulate("1f1b", stages, 4), simulate("star", stages, 4)
        >>> round(one_after_another.steady, 1), round(at_once.steady, 1)
        (20.3, 8.8)
    """
    if schedule not in SCHEDULES:
        raise ConfigError(f"unknown schedule {schedule!r}: one of {', '.join(SCHEDULES)}")
    if not stages or micro_batches < 1 or steps < 2:
        raise ConfigError("a pipeline needs stages, micro-batches, and at least 2 steps")
    pairs = [links] * (len(stages) - 1) if isinstance(links, Link) else list(links)
    if len(pairs) != len(stages) - 1:
        raise ConfigError(f"{len(stages)} stages have {len(stages) - 1} links, got {len(pairs)}")
    plan = _Plan(schedule, tuple(stages), micro_batches, tuple(pairs), error_bytes, relays)
    many = _Run(plan, steps)
    half = steps // 2
    work = [plan.seconds(stage) for stage in range(plan.count)]
    # a step that another rank ended late makes the steps after it look short
    steady = max(*work, (many.finished(steps - 1) - many.finished(half - 1)) / (steps - half))
    busy = sum(work)
    return Simulated(
        many.finished(0),
        steady,
        max(0.0, 1 - busy / (plan.count * steady)) if steady else 0.0,
        max((s.sends for s in stages[:-1]), default=0) * micro_batches,
        plan.back_bytes() * micro_batches,
        tuple(plan.most_held(stage) * stages[stage].holds for stage in range(plan.count)),
    )


@dataclass(frozen=True)
class _Plan:
    """What every rank does, and what each action waits for."""

    schedule: Schedule
    stages: tuple[StageCost, ...]
    micro_batches: int
    links: tuple[Link, ...]
    error_bytes: int
    relays: int

    @property
    def count(self) -> int:
        return len(self.stages)

    @property
    def backprop(self) -> bool:
        return self.schedule in _BACKPROP

    def duration(self, stage: int, kind: str) -> float:
        cost = self.stages[stage]
        inputs = cost.inputs if self.backprop else 0.0
        if kind == "B" and self.schedule == "zero-bubble":
            # nobody waits for the lowest stage, which does everything at once
            return inputs if stage else 0.0
        if kind == "W" and self.schedule == "zero-bubble":
            return cost.weights if stage else inputs + cost.weights
        if kind == "B":
            return inputs + cost.weights
        return cost.forward if kind == "F" else cost.update

    def seconds(self, stage: int) -> float:
        """What a rank computes in a step."""
        kinds = ("F", "B", "W") if self.schedule == "zero-bubble" else ("F", "B")
        work = sum(self.duration(stage, kind) for kind in kinds)
        return self.micro_batches * work + self.stages[stage].update

    def order(self, stage: int) -> list[Action]:
        """A rank's actions of one step."""
        M, S = self.micro_batches, self.count
        forwards = [("F", i) for i in range(M)]
        backwards = [("B", i) for i in range(M)]
        if self.schedule == "zero-bubble":
            return [*_zero_bubble(stage, S, M), ("U", 0)]
        if self.schedule in ("1f1b", "star-few") and M >= S:
            return [*_one_and_one(S - stage, M), ("U", 0)]
        return [*forwards, *backwards, ("U", 0)]

    def fills_waits(self, stage: int) -> bool:
        """Whether a rank that waits for an input runs backward passes meanwhile: it waits for no error."""
        return not self.backprop and (stage == self.count - 1 or self.schedule == "local")

    def needs(self, stage: int, kind: str, index: int, step: int) -> list[tuple[Key, int]]:
        """What an action waits for from other ranks, each with the bytes that travel."""
        if kind == "F" and stage:
            return [(("F", stage - 1, index, step), self.stages[stage - 1].sends)]
        if kind != "B" or stage == self.count - 1 or self.schedule == "local":
            return []
        if self.backprop:
            return [(("B", stage + 1, index, step), self.stages[stage].sends)]
        if self.schedule == "relays":
            relay = self.relay_above(stage)
            if relay < self.count - 1:
                return [(("B", relay, index, step), self.stages[relay - 1].sends)]
        return [(("F", self.count - 1, index, step), self.error_bytes)]

    def relay_above(self, stage: int) -> int:
        """The rank that sends this one its error."""
        run = max(1, math.ceil(self.count / max(1, self.relays)))
        top = self.count - 1
        return max(stage + 1, top - ((top - stage - 1) // run) * run)

    def travel(self, sender: int, receiver: int) -> list[tuple[int, int]]:
        """The links of a message, by the lower rank of the pair and the direction."""
        if self.schedule == "highway" and receiver < sender:
            return [(rank, -1) for rank in range(sender - 1, receiver - 1, -1)]
        low = min(sender, receiver, self.count - 2)
        return [(low, 1 if receiver > sender else -1)]

    def back_bytes(self) -> int:
        """Bytes of a micro-batch that arrive at a rank for its backward, at most."""
        if self.count == 1 or self.schedule == "local":
            return 0
        needs = [self.needs(stage, "B", 0, 0) for stage in range(self.count - 1)]
        return max(sum(size for _, size in need) for need in needs)

    def most_held(self, stage: int) -> int:
        """How many micro-batches a rank holds at once."""
        held = most = 0
        release = "W" if self.schedule == "zero-bubble" else "B"
        for kind, _ in self.order(stage):
            held += (kind == "F") - (kind == release)
            most = max(most, held)
        return most


class _Run:
    """The times of so many steps without a barrier."""

    def __init__(self, plan: _Plan, steps: int) -> None:
        self.plan, self.steps = plan, steps
        self.ends: dict[Key, float] = {}
        self._free = [0.0] * plan.count
        self._busy: dict[tuple[int, int], float] = defaultdict(float)
        self._arrivals: dict[tuple[Key, int], float] = {}
        orders = [plan.order(stage) for stage in range(plan.count)]
        self._lists = [
            [(kind, index, step) for step in range(steps) for kind, index in order]
            for order in orders
        ]
        self._next = [0] * plan.count
        self._waiting: dict[Key, list[int]] = defaultdict(list)
        ready = list(range(plan.count))
        while ready:
            self._advance(ready.pop(), ready)

    def _advance(self, stage: int, ready: list[int]) -> None:
        """Let a rank work until something has not arrived."""
        actions = self._lists[stage]
        while self._next[stage] < len(actions):
            kind, index, step = actions[self._next[stage]]
            needs = self.plan.needs(stage, kind, index, step)
            missing = next((key for key, _ in needs if key not in self.ends), None)
            if missing is not None:
                self._waiting[missing].append(stage)
                return
            arrivals = [self._arrival(key, size, stage) for key, size in needs]
            start = max([self._free[stage], *arrivals])
            waits = not math.isclose(start, self._free[stage], rel_tol=1e-9)
            if kind == "F" and waits and self._filled(stage, index, step):
                continue
            end = start + self.plan.duration(stage, kind)
            key = kind, stage, index, step
            self.ends[key] = self._free[stage] = end
            self._next[stage] += 1
            ready += self._waiting.pop(key, [])

    def _filled(self, stage: int, index: int, step: int) -> bool:
        """Put a backward pass that may run already before the forward pass whose input is not there."""
        if not self.plan.fills_waits(stage):
            return False
        actions, here = self._lists[stage], self._next[stage]
        place = next(i for i in range(here, len(actions)) if actions[i][0] == "B")
        if actions[place][1] >= index or actions[place][2] != step:
            return False
        actions.insert(here, actions.pop(place))
        return True

    def _arrival(self, key: Key, size: int, receiver: int) -> float:
        """When a message is there; the messages of one link and direction follow each other."""
        if (key, receiver) in self._arrivals:
            return self._arrivals[key, receiver]
        time = self.ends[key]
        for low, way in self.plan.travel(key[1], receiver):
            link = self.plan.links[low]
            if size and link.bandwidth < math.inf:
                time = max(time, self._busy[low, way]) + link.seconds(size)
                self._busy[low, way] = time
            time += link.latency
        self._arrivals[key, receiver] = time
        return time

    def finished(self, step: int) -> float:
        """When the slowest rank has ended a step."""
        return max(self.ends["U", stage, 0, step] for stage in range(self.plan.count))


def _one_and_one(warm: int, micro_batches: int) -> list[Action]:
    """One forward and one backward in turn, after so many forwards."""
    warm = min(warm, micro_batches)
    actions = [("F", i) for i in range(warm)]
    for i in range(micro_batches):
        actions.append(("B", i))
        if warm + i < micro_batches:
            actions.append(("F", warm + i))
    return actions


def _zero_bubble(stage: int, stages: int, micro_batches: int) -> list[Action]:
    """ZB1P: gradients of weights fill the places where a rank would wait (Qi et al., ICLR 2024), as
    `torch.distributed.pipelining` orders it."""
    warm = min(stages - 1 - stage, micro_batches)
    actions = [("F", i) for i in range(warm)]
    done = 0
    for i in range(micro_batches):
        if warm + i < micro_batches:
            actions.append(("F", warm + i))
        actions.append(("B", i))
        if i >= stage:
            actions.append(("W", done))
            done += 1
    return [*actions, *(("W", i) for i in range(done, micro_batches))]


def spread(segments: Sequence[StageCost], stages: int) -> list[StageCost]:
    """The segments as so many stages: each segment's times and bytes in one of them, as balanced as
    possible; or, for more stages than segments, equal parts of the whole (which a model of as many
    equal blocks has).

    Example:
        >>> from feedbackward.parallel.simulate import StageCost, spread
        >>> [stage.forward for stage in spread([StageCost(1.0, 1.0, 1.0)] * 4, stages=2)]
        [2.0, 2.0]
    """
    if stages > len(segments):
        whole = _together(segments)
        sends = sum(s.sends for s in segments[:-1]) // max(1, len(segments) - 1)
        times = (t / stages for t in (whole.forward, whole.inputs, whole.weights, whole.update))
        forward, inputs, weights, update = times
        part = StageCost(forward, inputs, weights, update, sends, whole.holds // stages)
        return [part] * stages
    cut = balanced([s.forward + s.weights for s in segments], stages)
    bounds = [0, *(place + 1 for place in cut), len(segments)]
    return [_together(segments[a:b]) for a, b in itertools.pairwise(bounds)]


def _together(segments: Sequence[StageCost]) -> StageCost:
    return StageCost(
        sum(s.forward for s in segments),
        sum(s.inputs for s in segments),
        sum(s.weights for s in segments),
        sum(s.update for s in segments),
        sends=segments[-1].sends,
        holds=sum(s.holds for s in segments),
    )


def balanced(times: Sequence[float], stages: int) -> tuple[int, ...]:
    """The numbers of the places (the first is 0) that divide segments of these times into stages
    whose slowest is as fast as it can be.

    Example:
        >>> from feedbackward.parallel.simulate import balanced
        >>> balanced([1.0, 1.0, 1.0, 3.0], stages=2)
        (2,)
    """
    # best[i]: of the divisions of the first i segments, the slowest stage and the places
    best: list[tuple[float, tuple[int, ...]]] = [
        (sum(times[:i]), ()) for i in range(len(times) + 1)
    ]
    for stage in range(1, stages):
        best = [
            min((max(best[k][0], sum(times[k:i])), (*best[k][1], k - 1)) for k in range(stage, i))
            if i > stage
            else (float("inf"), ())
            for i in range(len(times) + 1)
        ]
    return best[-1][1]
