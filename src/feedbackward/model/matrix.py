"""The weight of a layer that multiplies the last dimension of its input by a matrix, whatever the layer's class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from feedbackward.model.autograd_graph import Output, is_leaf
from feedbackward.model.trace import Call
from feedbackward.operators.layer import LayerForm

# views and casts that leave the rows of a tensor, and the order of its features, as they are
_ROWS = frozenset(["View", "UnsafeView", "Reshape", "ToCopy", "Clone"])
_TURNS = frozenset(["T", "Transpose"])


def matrix_form(call: Call) -> tuple[str, LayerForm] | None:
    """The name of the weight and the form of a layer whose output is `h W^T` or `h W`, a bias aside; None for all others."""
    (number, into, _), out = call.activity, call.outputs[0][0]
    if len(call.products) != 1 or len(call.outputs) != 1 or not isinstance(out, Tensor):
        return None
    (product,) = call.products
    operands = _operands(product)
    if operands is None or _through(call.left[0], _ROWS, product, sums=True)[0] is not product:
        return None
    given = call.entered[number]
    if _through(operands[0], _ROWS, given[0]) != given:
        return None
    turns: list[Any] = []
    leaf, _ = _through(operands[1], _ROWS | _TURNS, passed=turns.append)
    own = {id(p): name for name, p in call.module.named_parameters(recurse=False)}
    name = own.get(id(leaf.variable)) if leaf is not None and is_leaf(leaf) else None
    if leaf is None or name is None:
        return None
    straight = product.name().startswith("Linear")
    transposed = (sum(_kind(node) in _TURNS for node in turns) + straight) % 2 == 0
    form = LayerForm(tuple(leaf.variable.shape), transposed=transposed)
    outputs, inputs = form.shape[::-1] if transposed else form.shape
    rows_stay = out.shape[:-1] == into.shape[:-1]
    fits = rows_stay and (out.shape[-1], into.shape[-1]) == (outputs, inputs)
    return (name, form) if fits else None


def _operands(product: Any) -> tuple[Output, Output] | None:
    """The activity and the matrix; None where the activity is not the first factor, or is scaled."""
    name, factors = product.name(), product.next_functions
    if name.startswith("Addmm") and product._saved_alpha == 1:
        return factors[1], factors[2]
    return (factors[0], factors[1]) if name.startswith(("Mm", "Linear")) else None


def _kind(node: Any) -> str:
    return str(node.name()).removesuffix("Backward0")


def _through(
    output: Output,
    kinds: frozenset[str],
    end: Any = None,
    sums: bool = False,
    passed: Callable[[Any], object] = id,
) -> Output:
    """The first tensor below that no node of these kinds made, or that `end` made; with `sums`, a bias may be added."""
    while output[0] is not None and output[0] is not end:
        node = output[0]
        inner = [other for other in node.next_functions if not (other[0] and is_leaf(other[0]))]
        bias = sums and _kind(node) == "Add" and node._saved_alpha == 1 and len(inner) == 1
        if not bias and (_kind(node) not in kinds or len(node.next_functions) > 1):
            break
        passed(node)
        output = inner[0] if bias else node.next_functions[0]
    return output
