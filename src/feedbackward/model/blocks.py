"""Finding the blocks of a model: the modules whose outputs are the sites of `sites="blocks"`."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from feedbackward.errors import AttachError
from feedbackward.model.autograd_graph import (
    Node,
    below,
    dominators,
    is_product,
    parameter_behind,
    walk,
)
from feedbackward.model.trace import PARAMETRIC, Call, Trace

_RUNS = (nn.Sequential, nn.ModuleList)


def block_names(model: nn.Module, trace: Trace) -> list[str]:
    """The modules that repeat along the depth of a model, the outermost of each kind.

    A residual block adds its own input to what it computes. If there are such blocks, all modules of their classes are
    blocks too (a shortcut may hold a projection), and so are the other items of the Sequential or ModuleList that they are
    in, if everything passes through them. A module that holds a run of residual blocks is a stage and no block.

    In a model without any, blocks are the items of Sequential and ModuleList runs, or modules of a class that repeats,
    if everything passes through them.

    A module that is called twice or returns several tensors is no block.

    Raises AttachError where the model has none, naming modules that could be chosen by name.
    """
    calls = {c.name: c for c in trace.calls if trace.counts[c.name] == 1 and _can_be_block(c)}
    residual = {name for name, call in calls.items() if _is_residual(call)}
    items = _find_items(model, trace, residual)
    whole = _passed_by_all(calls, trace)
    blocks = _residual_blocks(calls, residual, items, whole) or _plain_blocks(calls, items, whole)
    if not blocks:
        near = ", ".join([*calls][:6])
        hint = f"modules that could be named instead: {near}" if near else 'use sites="layers"'
        raise AttachError(
            f'sites="blocks" found no residual or repeated block in {type(model).__name__}; {hint}.'
        )
    return [name for name in calls if name in blocks]


def _residual_blocks(
    calls: dict[str, Call], residual: set[str], items: dict[str, str], whole: set[str]
) -> set[str]:
    """The residual blocks, and those of their classes and runs."""
    repeated = Counter(type(call.module) for call in calls.values())
    # a container of a whole net's blocks adds its own input too
    found = {
        name for name in residual if name in items or repeated[type(calls[name].module)] > 1
    } or {name for name in residual if not any(_within(item, name) for item in items)}
    stages = {name for name in found if any(_within(item, name) for item in residual & {*items})}
    found = _outermost(found - stages)
    classes = {type(calls[name].module) for name in found}
    found = _outermost(found | {n for n, c in calls.items() if type(c.module) in classes} - stages)
    runs = {items[name] for name in found if name in items}
    beside = {name for name in whole if items.get(name) in runs}
    return _outermost(found | {n for n in beside if not any(_within(f, n) for f in found)})


def _plain_blocks(calls: dict[str, Call], items: dict[str, str], whole: set[str]) -> set[str]:
    """Of those through which everything passes, the items of runs, or the innermost if a class repeats."""
    if listed := whole & {*items}:
        return listed
    inner = {name for name in whole if not any(_within(other, name) for other in whole)}
    repeated = Counter(type(calls[name].module) for name in inner)
    return inner if max(repeated.values(), default=0) > 1 else set()


def _passed_by_all(calls: dict[str, Call], trace: Trace) -> set[str]:
    """The modules whose output is all that the model's output knows of what came before."""
    output = next((t for t in tree_leaves(trace.output) if isinstance(t, Tensor)), None)
    passed = set[Node]() if output is None else dominators(output)
    return {name for name, call in calls.items() if _made(call)[0].grad_fn in passed}


def _find_items(model: nn.Module, trace: Trace, residual: set[str]) -> dict[str, str]:
    """The items of Sequential and ModuleList runs, and for each the outermost run that it is in.

    A run of runs is taken apart, and so is an item that holds residual blocks in a run, with all others of its run that hold
    runs, or that only returns what the last item of a run within it made.
    """
    outputs = {call.name: {(id(t), v) for t, v in call.outputs} for call in trace.calls}

    def passes_on(name: str, inner: list[str]) -> bool:
        return bool(outputs.get(name, set()) & outputs.get(inner[-1], set()))

    def items(module: nn.Module, prefix: str) -> Iterator[str]:
        within = {
            name: list(items(child, f"{prefix}{name}.")) for name, child in module.named_children()
        }
        listing = isinstance(module, _RUNS)
        stages = listing and bool(residual & {*itertools.chain(*within.values())})
        for child_name, inner in within.items():
            name, child = f"{prefix}{child_name}", module.get_submodule(child_name)
            apart = isinstance(child, _RUNS) or stages or bool(residual & {*inner})
            whole = not inner or not (apart or passes_on(name, inner))
            if whole and listing and _is_composed(child):
                yield name
            else:
                yield from inner

    def outermost_run(name: str) -> str:
        parts = name.split(".")
        prefixes = [".".join(parts[:i]) for i in range(len(parts))]
        return next(p for p in prefixes if isinstance(model.get_submodule(p), _RUNS))

    return {name: outermost_run(name) for name in items(model, "") if name in outputs}


def _can_be_block(call: Call) -> bool:
    return bool(call.name) and _is_composed(call.module) and len(_made(call)) == 1


def _made(call: Call) -> list[Tensor]:
    """The tensors with a gradient that a call returned."""
    found = {id(t): t for t, _ in call.outputs if isinstance(t, Tensor) and t.grad_fn is not None}
    return list(found.values())


def _is_composed(module: nn.Module) -> bool:
    """Whether a module is more than one layer and holds weights of layers, of whatever class."""
    if isinstance(module, PARAMETRIC) or next(module.children(), None) is None:
        return False
    holders = (m for m in module.modules() if not isinstance(m, nn.Embedding))
    return any(p.dim() > 1 for m in holders for p in m.parameters(recurse=False))


def _outermost(names: set[str]) -> set[str]:
    return {name for name in names if not any(_within(name, other) for other in names)}


def _within(name: str, other: str) -> bool:
    return name.startswith(other + ".")


def _is_residual(call: Call) -> bool:
    """Whether a path of sums leads from the input to the output: no product, no gate, no concatenation."""
    goals = {t.grad_fn for t, _ in call.inputs if t.grad_fn is not None}
    return any(node in goals for node in walk([_made(call)[0].grad_fn], _through_sums))


def _through_sums(node: Node) -> list[Node]:
    """A way onward that ends at products of what depends on the data, and where tensors are joined."""
    gate = (
        node.name().startswith("Mul") and sum(parameter_behind(n) is None for n in below(node)) > 1
    )
    joint = node.name().startswith(("Cat", "Stack"))
    return [] if gate or joint or is_product(node) else below(node)
