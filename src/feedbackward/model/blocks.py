"""Finding the blocks of a model: the modules whose outputs are the sites of `sites="blocks"`."""

from __future__ import annotations

from torch import Tensor, nn

from feedbackward.errors import AttachError
from feedbackward.model.autograd_graph import not_through_products, walk
from feedbackward.model.trace import PARAMETRIC, Call, Trace

_RUNS = (nn.Sequential, nn.ModuleList)


def block_names(model: nn.Module, trace: Trace) -> list[str]:
    """Items of the outermost Sequential or ModuleList runs, and modules that add or concatenate their own input.

    A run of runs is taken apart, and so is an item that only returns what the last item of a run within it made.

    Raises AttachError where the model has none, naming modules that could be chosen by name.
    """
    outputs = {call.name: {(id(t), v) for t, v in call.outputs} for call in trace.calls}
    listed = [name for name in _items(model, outputs) if name in outputs]
    residual = [call.name for call in trace.calls if call.name and _is_residual(call)]
    inside = [
        name
        for name in residual
        if not any(_within(name, other) for other in [*listed, *residual] if other != name)
        and not any(_within(item, name) for item in listed)
    ]
    blocks = list(dict.fromkeys(listed + inside))
    if not blocks:
        near = [
            c.name
            for c in trace.calls
            if c.name and _is_composed(c.module) and trace.counts[c.name] == 1
        ][:6]
        hint = (
            f"modules that could be named instead: {', '.join(near)}"
            if near
            else 'use sites="layers"'
        )
        raise AttachError(
            f'sites="blocks" found no residual or repeated block in {type(model).__name__}; {hint}.'
        )
    return blocks


def _items(
    module: nn.Module, outputs: dict[str, set[tuple[int, int]]], prefix: str = ""
) -> list[str]:
    names: list[str] = []
    for child_name, child in module.named_children():
        name = f"{prefix}{child_name}"
        inner = _items(child, outputs, f"{name}.")
        passes_on = bool(inner) and bool(outputs.get(name, set()) & outputs.get(inner[-1], set()))
        if inner and (isinstance(child, _RUNS) or passes_on):
            names += inner
        elif isinstance(module, _RUNS) and _is_composed(child):
            names.append(name)
        else:
            names += inner
    return names


def _is_composed(module: nn.Module) -> bool:
    """Whether a module is more than one layer and holds weights of layers, of whatever class."""
    if isinstance(module, PARAMETRIC) or next(module.children(), None) is None:
        return False
    holders = (m for m in module.modules() if not isinstance(m, nn.Embedding))
    return any(p.dim() > 1 for m in holders for p in m.parameters(recurse=False))


def _within(name: str, other: str) -> bool:
    return name.startswith(other + ".")


def _is_residual(call: Call) -> bool:
    """Whether a path without any matrix product or convolution leads from the input to the output."""
    if not _is_composed(call.module) or not call.outputs or not call.inputs:
        return False
    goals = {t.grad_fn for t, _ in call.inputs if t.grad_fn is not None}
    made = (t.grad_fn for t, _ in call.outputs if isinstance(t, Tensor))
    return any(node in goals for node in walk(made, not_through_products))
