"""Finding the dimension of a tensor that holds features, from the autograd graph that made it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from feedbackward.model.autograd_graph import Output, moved_dims, shape_of

CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
CHANNELS_FIRST = (*CONVOLUTIONS, nn.modules.batchnorm._NormBase, nn.GroupNorm)
# on a map they normalise the last dimension, which need not hold features: the layers before them are asked first
_NORMS_LAST = (nn.LayerNorm, nn.RMSNorm)
FEATURES_LAST = (nn.Linear, *_NORMS_LAST, nn.Embedding, nn.RNNBase, nn.MultiheadAttention)

# the nodes passed on the way down, the lowest first
_Path = tuple[Any, "_Path"] | None


def feature_axis(tensor: Tensor, made: dict[Output, nn.Module]) -> int | None:
    """The dimension that holds the features of the nearest layer below the tensor; None if the graph does not show it.

    made: the outputs of the layers, and the layer of each.

    The search follows operands that have the tensor's form. A gate or an embedding that is broadcast says nothing about the
    dimensions.
    """
    stack: list[tuple[Output, _Path]] = [((tensor.grad_fn, tensor.output_nr), None)]
    seen, norms = set[Output](), list[tuple[Output, _Path]]()
    while stack:
        output, path = stack.pop()
        if output[0] is None or output in seen:
            continue
        seen.add(output)
        layer = made.get(output)
        product = layer is None and output[0].name().startswith(_PRODUCTS)
        if layer is not None and isinstance(layer, _NORMS_LAST):
            norms.append((output, path))
        elif layer is not None or product:
            first = isinstance(layer, CHANNELS_FIRST) or (
                product and output[0].name().startswith("Convolution")
            )
            axis = 1 if first else len(shape_of(output)) - 1
            found = _through(axis, shape_of(output), path)
            if found is not None:
                return found
            continue
        below = list(_below(output))
        stack += [(parent, (output, path)) for parent in reversed(below)]
    for output, path in norms:
        found = _through(len(shape_of(output)) - 1, shape_of(output), path)
        if found is not None:
            return found
    return None


def _below(output: Output) -> Iterator[Output]:
    """The operands that have the dimensions of the result, those of the same shape first."""
    node, shape = output[0], shape_of(output)
    parents = [parent for parent in node.next_functions if parent[0] is not None]
    if moved_dims(node, len(shape)) is not None or node.name().startswith(_VIEWS):
        yield from parents
        return
    yield from (parent for parent in parents if shape_of(parent) == shape)
    alike = [p for p in parents if len(shape_of(p)) == len(shape) and shape_of(p) != shape]
    # a pool or a slice has one operand; among several operands, those of size 1 are broadcast
    if node.name().startswith("Cat") or len(parents) == 1:
        yield from alike


def _through(axis: int, shape: tuple[int, ...], path: _Path) -> int | None:
    """Where a dimension of a layer's output is after the operations on the path."""
    found: int | None = axis
    while path is not None and found is not None:
        output, path = path
        after = shape_of(output)
        found = _after(output[0], found, shape, after)
        shape = after
    return found


def _after(node: Any, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> int | None:
    order = moved_dims(node, len(before))
    if order is not None:
        return order.index(axis)
    if node.name().startswith(_VIEWS):
        if before[: axis + 1] == after[: axis + 1]:
            return axis
        if axis == len(before) - 1 and before[-1:] == after[-1:]:
            return len(after) - 1
        return None
    same = before[axis] == after[axis] or node.name().startswith("Cat")
    return axis if same else None


# products with a weight that no module applies
_PRODUCTS = ("Convolution", "Addmm", "Linear")
_VIEWS = ("View", "UnsafeView", "Reshape", "Alias", "Squeeze", "Unsqueeze", "Flatten", "Unflatten")
