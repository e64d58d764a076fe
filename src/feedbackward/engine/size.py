"""How large feedback will be, before any of it is made, and how much memory is free."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path

import torch

from feedbackward.activity import LayerInput
from feedbackward.errors import AttachError
from feedbackward.graph import Edge, Graph
from feedbackward.operators import Auto

# the share of the free memory that feedback may take: activities, gradients and the optimizer need some
SHARE = 0.5


def refuse_too_large(graph: Graph, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse feedback that would take more than half of the memory that is free. Nothing is made."""
    free = free_bytes(device)
    if free is None:
        return
    needed = count(graph.edges, dtype)
    if needed <= SHARE * free:
        return
    largest = max(graph.edges, key=lambda e: math.prod(e.source_shape) * math.prod(e.site_shape))
    raise AttachError(
        f"the feedback would take {in_bytes(needed)}, and {in_bytes(free)} are free on {device} (at most half of it is used); the "
        f"largest is that of site {largest.site.name!r}, {math.prod(largest.source_shape)} x {math.prod(largest.site_shape)}. "
        f'Smaller: {smaller(graph, dtype)}, or sites="blocks".'
    )


def smaller(graph: Graph, dtype: torch.dtype) -> str:
    """Operators whose feedback is smaller than that of this graph, with what the automatic one takes, if it is one of them."""
    chosen = [e for e in graph.edges if not isinstance(e.site, LayerInput)]
    fixed = count((e for e in graph.edges if isinstance(e.site, LayerInput)), dtype)
    auto = sum(Auto().bytes(e.source_shape, e.site_shape) for e in chosen) * dtype.itemsize // 4
    others = "fb.Sparse(1) or fb.LowRank(r)"
    if fixed + auto < count(graph.edges, dtype):
        return f'operator="auto" ({in_bytes(fixed + auto)}), {others}'
    return others


def count(edges: Iterable[Edge], dtype: torch.dtype) -> int:
    """Bytes of the weights of these edges."""
    sets: dict[str, int] = {}
    for e in edges:
        size = e.operator.bytes(e.source_shape, e.site_shape)
        sets[e.key] = max(size, sets.get(e.key, 0))
    return sum(sets.values()) * dtype.itemsize // 4


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on the device; None where nobody can tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    found = [_available(), _group()]
    return min((n for n in found if n is not None), default=None)


def _available() -> int | None:
    """What Linux says could be given without swapping; elsewhere all memory of the machine."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        known = dict(line.split(":", 1) for line in lines)
        return int(known["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _group() -> int | None:
    """What is left of a container's limit."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((folder / f"memory.{n}").read_text()) for n in ("max", "current"))
        cached = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    # the kernel gives up files that it keeps in memory
    return limit - used + int(cached.get("file", 0))


def in_bytes(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
