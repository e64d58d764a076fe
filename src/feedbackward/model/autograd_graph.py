"""The one walker of autograd's graphs. Their edges lead from a tensor down to the tensors that it was made from."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

Node = Any
# a node and the number of its output
Output = tuple[Node, int]

# how the nodes of matrix products and convolutions begin
PRODUCTS = ("Convolution", "Addmm", "Mm", "Bmm", "Linear", "ScaledDot", "Baddbmm")
# what may be picked by the data
BY_DATA = ("Embedding", "Index", "Gather", "Take")
# or is repeated for every sample
_PICKED = (*BY_DATA, "Expand", "Repeat")
# how the nodes of a dropout begin, and those of a reshape
_MASKING = ("NativeDropout", "Mul")
_RESHAPING = ("View", "UnsafeView", "ReshapeAlias")
# views and casts of a single tensor
PASSING = frozenset(
    [
        "T",
        "View",
        "UnsafeView",
        "Transpose",
        "Permute",
        "Expand",
        "ToCopy",
        "Reshape",
        "Unsqueeze",
        "Squeeze",
        "Clone",
    ]
)


def made_by(tensor: Any) -> Output:
    """The node that made a tensor, and which of its outputs it is; no node for a leaf or another object."""
    node = tensor.grad_fn if isinstance(tensor, Tensor) else None
    return node, tensor.output_nr if node is not None else 0


def below(node: Node) -> list[Node]:
    """The nodes that made the node's operands; leaves are among them."""
    return [parent for parent, _ in node.next_functions if parent is not None]


def below_without_leaves(node: Node) -> list[Node]:
    """The nodes that made the node's operands, but for the parameters themselves."""
    return [parent for parent in below(node) if parent.next_functions]


def walk(roots: Iterable[Any], onward: Callable[[Any], Iterable[Any]] = below) -> list[Any]:
    """The roots and all that they lead to, once each, and each before those that it leads to. None is no root."""
    done: dict[Any, None] = {}
    entered: set[Any] = set()
    stack = [(root, False) for root in roots if root is not None]
    while stack:
        node, left = stack.pop()
        if left:
            done[node] = None
        elif node not in entered:
            entered.add(node)
            stack.append((node, True))
            # the first operand is walked first: a weight comes right before the product that uses it
            stack += [(other, False) for other in reversed(list(onward(node)))]
    return list(reversed(done))


def leaves(tensor: Tensor) -> list[Tensor]:
    """The parameters and inputs with gradients that a tensor was made from."""
    return [node.variable for node in walk([tensor.grad_fn]) if is_leaf(node)]


def is_leaf(node: Node) -> bool:
    """Whether the node gathers the gradient of a leaf, its `variable`."""
    return hasattr(node, "variable")


def shapes_of(node: Node) -> list[tuple[int, ...]]:
    """The shapes of what a node made, or of a leaf."""
    if is_leaf(node):
        return [tuple(node.variable.shape)]
    return [tuple(made.shape) for made in node._input_metadata]


def shape_of(output: Output) -> tuple[int, ...]:
    """The shape of what a node made, or of a leaf."""
    node, number = output
    shapes = shapes_of(node)
    return shapes[number] if number < len(shapes) else ()


def signed(number: int) -> int:
    """The number that autograd saved: it stores a negative one as an unsigned number."""
    return number - 2**64 if number >= 2**63 else number


def moved_dims(node: Node, count: int) -> list[int] | None:
    """Of an operation that only reorders so many dimensions, where each came from; None of another."""
    name, order = node.name(), list(range(count))
    if name.startswith("Transpose"):
        a, b = signed(node._saved_dim0) % count, signed(node._saved_dim1) % count
        order[a], order[b] = b, a
        return order
    if name.startswith("Permute"):
        return [signed(d) % count for d in node._saved_dims]
    return order[::-1] if name == "TBackward0" else None


def is_product(node: Node) -> bool:
    """Whether the node is of a matrix product or a convolution."""
    return bool(node.name().startswith(PRODUCTS))


def not_through_products(node: Node) -> list[Node]:
    """A way onward that ends at matrix products and convolutions."""
    return [] if is_product(node) else below(node)


def outputs_behind(tensor: Tensor) -> set[Output]:
    """Every node that leads to the tensor, its own included, with the number of its output that does."""
    if tensor.grad_fn is None:
        return set()

    def onward(output: Output) -> list[Output]:
        return [edge for edge in output[0].next_functions if edge[0] is not None]

    return set(walk([(tensor.grad_fn, tensor.output_nr)], onward))


def leading_to(tensor: Tensor, ends: Sequence[Tensor]) -> set[Node]:
    """The nodes of the tensor's graph that lead down to one of these tensors, but for those that made it."""
    outputs = {(end.grad_fn, end.output_nr) for end in ends}
    found = set[Node]()
    for node in reversed(walk([tensor.grad_fn])):
        if any(parent in found or (parent, n) in outputs for parent, n in node.next_functions):
            found.add(node)
    return found


def parameter_behind(node: Node) -> Tensor | None:
    """The leaf behind an operand, if nothing but views and casts lie between."""
    while node is not None and not is_leaf(node):
        name = node.name().removesuffix("Backward0").removesuffix("Backward1")
        if name not in PASSING or len(node.next_functions) != 1:
            return None
        node = node.next_functions[0][0]
    return None if node is None else node.variable


def flattened_from(tensor: Tensor) -> tuple[int, ...]:
    """`(c, *space)` of the maps that a flatten made vectors `[N, n]` of, also through a dropout.

    Empty for other tensors, and for maps of one place.
    """
    node = tensor.grad_fn
    while node is not None and node.name().startswith(_MASKING):
        node = node.next_functions[0][0]
    if tensor.dim() != 2 or node is None or not node.name().startswith(_RESHAPING):
        return ()
    shape = tuple(int(n) for n in node._saved_self_sym_sizes)  # type: ignore[attr-defined]
    made_by = node.next_functions[0][0]
    if made_by is not None and made_by.name().startswith("Clone"):
        made_by = made_by.next_functions[0][0]
    # moved dimensions: the first one need not be the channels
    if made_by is None or made_by.name().startswith(("Permute", "Transpose")):
        return ()
    if len(shape) not in (4, 5) or shape[0] != len(tensor) or max(shape[2:]) == 1:
        return ()
    return shape[1:]


def weight_behind(operand: Output) -> Tensor | None:
    """The parameter that a factor of a product is, or was made from as a matrix of its size: masked, normed or quantised."""
    node, number = operand
    if node is None or (found := parameter_behind(node)) is not None:
        return found if node is not None else None
    nodes = walk([node])
    if any(is_product(n) or n.name().startswith(BY_DATA) for n in nodes):
        return None
    size = sorted(node._input_metadata[number].shape)
    like = (n.variable for n in nodes if is_leaf(n) and sorted(n.variable.shape) == size)
    return next((p for p in like if p.dim() > 1), None)


def made_of_weights(tensors: Iterable[Tensor], own: set[int]) -> set[Node]:
    """The nodes behind the tensors that took nothing but parameters and buffers.

    own: where the storages of the model's parameters and buffers begin.
    """
    alone = set[Node]()
    for node in reversed(walk(t.grad_fn for t in tensors)):
        if is_leaf(node):
            known = storage_of(node.variable) in own
        else:
            known = alone.issuperset(below(node)) and not node.name().startswith(BY_DATA)
            known = known and all(storage_of(t) in own for t in _saved(node) if _is_given(t))
        if known:
            alone.add(node)
    return alone


def weights_behind(operand: Output, alone: set[Node]) -> list[Tensor]:
    """The parameters whose product a factor is, with each other or with buffers: a low-rank or a turned weight.

    alone: the nodes that took nothing but parameters and buffers.
    """
    nodes = walk([operand[0]]) if operand[0] in alone else []
    return [n.variable for n in nodes if is_leaf(n)] if any(map(is_product, nodes)) else []


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _saved(node: Node) -> Iterator[Tensor]:
    """The tensors that a node keeps for its backward pass."""
    for name in dir(node):
        if name.startswith("_saved_"):
            yield from (t for t in tree_leaves(getattr(node, name)) if isinstance(t, Tensor))


def _is_given(tensor: Tensor) -> bool:
    """Whether a tensor was made without gradients and is more than a number."""
    return tensor.grad_fn is None and not tensor.requires_grad and tensor.dim() > 0


def of_parameters(tensor: Tensor) -> bool:
    """Whether a tensor is a weight of its own: a number, or made of parameters by operations that take nothing else.

    Products count as layers, and what is picked by number may have been picked by the data.
    """
    if tensor.dim() == 0:
        return True
    stack, seen = [tensor.grad_fn], set[Node]()
    while stack:
        node = stack.pop()
        if node is None or is_product(node) or node.name().startswith(_PICKED):
            return False
        if node not in seen and not is_leaf(node):
            seen.add(node)
            stack += [parent for parent, _ in node.next_functions]
    return True


def dominators(tensor: Tensor) -> set[Node]:
    """The nodes through which all that was made before them reaches the tensor: no other path leads round them."""
    nodes = walk([tensor.grad_fn], below_without_leaves)
    order = {node: place for place, node in enumerate(reversed(nodes))}
    # how many edges begin to lead round a place, less those that end there
    rounds = [0] * (len(order) + 1)
    for node, place in order.items():
        for other in below_without_leaves(node):
            rounds[order[other] + 1] += 1
            rounds[place] -= 1
    passing = list(itertools.accumulate(rounds))
    return {node for node, place in order.items() if not passing[place]}
