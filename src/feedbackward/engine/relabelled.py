"""Whether the rows of activities are those of the inputs: for another order of the inputs, they come in that order too.

This tells the nodes of a graph, whose rows are mixed along its edges, from a batch that the model reorders. Edges and
adjacency matrices name nodes, so they are written anew for the order. A swap of two rows and a step round of all make up every
order, and a reordering that follows both is none.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from feedbackward.activity import Activity
from feedbackward.model.example import copied
from feedbackward.model.trace import trace
from feedbackward.model.values import tensors_within

# by how much of what usually lies between two rows a row may miss its expected value
_ROOM = 0.05
# what of a model is read like its inputs: nothing, buffers and attributes (an adjacency), parameters as well (embeddings)
_STATES = ("inputs", "buffers", "parameters")
# of so many inputs whose shapes leave open what they mean, each meaning is tried
_OPEN = 3


def moves_along(model: nn.Module, inputs: Any, ends: Sequence[Activity], count: int) -> bool:
    """Whether these activities, of so many rows, are seen to be in the order of the inputs whatever that is.

    The passes are in evaluation mode, on copies. False also where it cannot be seen: of two rows, which have two orders only;
    where rows are alike; and where a graph is hidden in the code of the model.
    """
    if count < 3:
        return False
    swap, step = torch.arange(count), torch.arange(count).roll(1)
    swap[:2] = torch.tensor([1, 0])
    try:
        usual = _values(model, inputs, ends)
        unclear = sum(_is_open(t, count) for t in tensors_within(inputs))
        meanings = list(itertools.product((True, False), repeat=min(unclear, _OPEN)))
        for state, names in itertools.product(_STATES, meanings):
            if all(
                _same(before[order.to(before.device)], now, before)
                for order in (step, swap)
                for before, now in zip(
                    usual, _values(*_written(order, model, inputs, state, names), ends), strict=True
                )
            ):
                return True
    except Exception:
        # whatever a model makes of inputs that are in another order
        return False
    return False


def _written(
    order: Tensor, model: nn.Module, inputs: Any, state: str, names: Sequence[bool]
) -> tuple[nn.Module, Any]:
    """Copies of model and inputs in this order. `names`: of each open input whether it names nodes, or has features only."""
    model, inputs = copy.deepcopy(model), copied(inputs)
    meanings = itertools.chain(names, itertools.repeat(True))
    for t in tensors_within(inputs):
        _write(t, order, _is_open(t, len(order)) and next(meanings))
    if state != "inputs":
        for t in tensors_within([[m._buffers, _attributes(m)] for m in model.modules()]):
            _write(t, order, True)
    if state == "parameters":
        for p in model.parameters():
            _write(p, order, False)
    return model, inputs


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if not name.startswith("_")}


def _is_open(t: Tensor, count: int) -> bool:
    """Whether a tensor with rows may name nodes in them: a square matrix (an adjacency), whole numbers (lists of neighbours)."""
    if t.layout != torch.strided or not t.dim() or len(t) != count:
        return False
    return _names(t, count) or t.shape[1:2] == (count,)


def _names(t: Tensor, count: int) -> bool:
    """Whether all that a tensor holds are numbers of rows."""
    whole = not (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool)
    return whole and bool((t >= 0).all() and (t < count).all())


def _write(t: Tensor, order: Tensor, names: bool) -> None:
    """Write a tensor anew for this order of the rows, in place. `names`: whether one that has rows names nodes in them."""
    count, t, order = len(order), t.detach(), order.to(t.device)
    place = order.argsort()
    if t.layout == torch.sparse_coo:
        for numbers, size in zip(t._indices(), t.shape, strict=False):
            if size == count:
                numbers.copy_(place[numbers])
    elif t.layout == torch.strided and t.dim() and t.numel():
        whole = _names(t, count)
        if len(t) == count:
            made = t[order]
            if names and t.shape[1:2] == (count,):
                made = made[:, order]
            elif names and whole:
                made = place[made.long()]
            t.copy_(made)
        elif whole:
            t.copy_(place[t.long()])


def _values(model: nn.Module, inputs: Any, ends: Sequence[Activity]) -> list[Tensor]:
    recorded = trace(model, inputs, evaluation=True)
    return [recorded.tensor_at(end.points[0]).detach().flatten(1).double() for end in ends]


def _same(expected: Tensor, found: Tensor, rows: Tensor) -> bool:
    """Whether each row is where it is expected, as far as rows can be told apart."""
    apart = (rows - rows.roll(1, 0)).norm(dim=1).median()
    return bool(apart > 0) and bool(((found - expected).norm(dim=1) <= _ROOM * apart).all())
