"""When each rank did what: a Chrome trace."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from feedbackward.parallel.mail import Mail
from feedbackward.parallel.step import Event


class Timeline:
    """The events of this rank. Times count from a moment at which all ranks met."""

    def __init__(self, mail: Mail) -> None:
        self.mail = mail
        self.events: list[Event] = []
        if mail.up is not None:
            dist.barrier(group=mail.up)
        self.zero = time.perf_counter()

    def write(self, path: str | os.PathLike[str]) -> list[list[Event]] | None:
        """Gather the events on rank 0, and write them there."""
        own = [(*event[:3], event[3] - self.zero, event[4] - self.zero) for event in self.events]
        found: list[Any] | None = [own]
        if self.mail.up is not None:
            found = [None] * self.mail.size if self.mail.rank == 0 else None
            dist.gather_object(own, found, group=self.mail.up, group_dst=0)
        if found is not None:
            Path(path).write_text(json.dumps(chrome(found)))
        return found


def chrome(ranks: Sequence[Sequence[Event]]) -> dict[str, Any]:
    """The events of all ranks in the trace event format, a thread for each rank."""
    names = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": rank, "args": {"name": f"rank {rank}"}}
        for rank in range(len(ranks))
    ]
    events = [
        {
            "ph": "X",
            "name": f"{what} {index}",
            "cat": what,
            "pid": 0,
            "tid": rank,
            "ts": 1e6 * start,
            "dur": 1e6 * (end - start),
            "args": {"step": step, "micro-batch": index},
        }
        for rank, own in enumerate(ranks)
        for what, step, index, start, end in own
    ]
    return {"traceEvents": [*names, *events], "displayTimeUnit": "ms"}
