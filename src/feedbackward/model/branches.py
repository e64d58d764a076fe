"""Finding residual branches: where a skip path that holds no weights leaves the tensor that a branch starts from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from feedbackward.activity import HookPoint, Site
from feedbackward.model.autograd_graph import below, below_without_leaves, is_leaf, is_product, walk
from feedbackward.model.trace import Call, Trace


def branch_inputs(trace: Trace, final: Tensor) -> Iterator[tuple[int, Site | str]]:
    """For each residual branch below the tensor: when it begins, and its input as the branch alone sees it.

    A branch is one side of a sum whose other side, the skip path, leads to the same tensor through no matrix product or
    convolution, or through a single one (a projection) where the branch has more. In place of the input there are words where
    the branch does not begin with a module.
    """
    found: dict[HookPoint, None] = {}
    for total in reversed(walk([final.grad_fn], below_without_leaves)):
        if not total.name().startswith("AddBackward"):
            continue
        sides = [_products(n) for n in below(total)]
        fork, branch = _fork(sides)
        if fork is None:
            continue
        calls = _outermost(_leaving(trace, fork, branch, total))
        if not calls:
            yield _start(trace, fork), f"the branch that leaves the output of {fork.name()}"
        for call, place in calls:
            point = HookPoint(call.name, "input", call.index, place=call.places[place])
            if point not in found:
                found[point] = None
                yield call.start, _branch(call, place, point)


def _branch(call: Call, place: int, point: HookPoint) -> Site:
    tensor = call.inputs[place][0]
    return Site(f"{call.name}.input", (point,), tuple(tensor.shape[1:]))


def _products(top: Any) -> dict[Any, int]:
    """The fewest products on a path from the node down to each below it, its own included, the lowest nodes first."""
    if is_leaf(top):
        return {}
    order = walk([top], below_without_leaves)
    fewest = {top: int(is_product(top))}
    for node in order:
        for other in below_without_leaves(node):
            through = fewest[node] + is_product(other)
            fewest[other] = min(through, fewest.get(other, through))
    return {node: fewest[node] for node in reversed(order)}


def _fork(sides: list[dict[Any, int]]) -> tuple[Any, dict[Any, int]]:
    """The node that both sides of a sum start from, and the side that is the branch; None where there is no branch.

    The products of the fork itself lie below both.
    """
    if len(sides) < 2:
        return None, {}
    a, b = sides
    for skip in (0, 1):
        for node in (n for n in reversed(a) if n in b):
            own = is_product(node)
            fewest, most = sorted((a[node] - own, b[node] - own))
            if fewest == skip < most:
                return node, a if a[node] > b[node] else b
    return None, {}


def _leaving(trace: Trace, fork: Any, branch: dict[Any, int], total: Any) -> list[tuple[Call, int]]:
    """The calls within the branch that are given what the fork made, with the number of that input."""
    return [
        (call, place)
        for call in trace.calls
        for place, (tensor, _) in enumerate(call.inputs)
        if tensor.grad_fn is fork
        and any(
            isinstance(t, Tensor) and t.grad_fn is not fork and _within(t.grad_fn, branch, total)
            for t, _ in call.outputs
        )
    ]


def _within(node: Any, branch: dict[Any, int], total: Any) -> bool:
    return node in branch and node is not total


def _outermost(calls: list[tuple[Call, int]]) -> list[tuple[Call, int]]:
    return [
        (call, place)
        for call, place in calls
        if not any(other.start < call.start and call.end < other.end for other, _ in calls)
    ]


def _start(trace: Trace, fork: Any) -> int:
    """When the tensor was there from which the branch starts."""
    ends = [
        c.end for c in trace.calls if any(getattr(t, "grad_fn", None) is fork for t, _ in c.outputs)
    ]
    return min(ends, default=0)
