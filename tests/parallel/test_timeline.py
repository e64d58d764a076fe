"""The trace of a pipeline: every action of every rank, in the order in which it must be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nets import RULES, Case
from ranks import needs_gloo, run_ranks
from torch.nn import functional as F

import feedbackward as fb

pytestmark = needs_gloo


def traced(rank: int, path: Path) -> Any:
    case = Case("plain", RULES["dkp"], rows=(16,))
    x, y = case.batch(0)
    pipe = fb.parallel.pipeline(case.learner(), x, timeout=120)
    optimizer = case.optimizer(pipe)
    pipe.start_trace()
    for _ in range(2):
        pipe.backward(x, F.cross_entropy, y)
        optimizer.step()
        optimizer.zero_grad()
    return pipe.write_trace(path)


def test_trace(tmp_path: Path) -> None:
    first, second = run_ranks(traced, 2, tmp_path, tmp_path / "trace.json")
    assert second is None
    assert len(first) == 2
    for events in first:
        work = [event for event in events if event[0] != "wait"]
        for what in ("forward", "backward"):
            of_kind = [tuple(event[1:3]) for event in work if event[0] == what]
            assert of_kind == [(step, i) for step in (0, 1) for i in range(4)]
        # the last rank runs backward passes while it waits, of micro-batches whose forward has ended
        order = [tuple(event[:3]) for event in work]
        assert all(
            order.index(("forward", step, i)) < order.index(("backward", step, i))
            for _, step, i in order
        )
        starts = [event[3] for event in work]
        assert starts == sorted(starts)
        assert all(start <= end for *_, start, end in events)
    ends = {tuple(event[:3]): event[4] for event in first[0]}
    starts = {tuple(event[:3]): event[3] for event in first[1]}
    # the clocks of two processes of a machine agree
    assert all(
        ends["forward", step, i] <= starts["forward", step, i] + 0.05
        for step in (0, 1)
        for i in range(4)
    )
    written = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["tid"] for event in written} == {0, 1}
    assert sum(event["ph"] == "X" for event in written) == sum(map(len, first))
