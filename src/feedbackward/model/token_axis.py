"""The token axis of a source, followed down autograd's graph: which tensors have a token for each of the source's.

Every operation says where the axis of its result is in each operand. A matrix product has the rows of its first factor and the
columns of its second, so the keys and values of attention do not have the axis of its output, in whatever order the factors
stand. A sum over the axis does not have it either. A loop over tokens picks one of them, and is followed for a few of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

from feedbackward.model.autograd_graph import (
    BY_DATA,
    Node,
    Output,
    is_leaf,
    is_product,
    moved_dims,
    shapes_of,
    signed,
    walk,
)
from feedbackward.model.axis_parts import (
    PICKED,
    Axis,
    Part,
    Place,
    Steps,
    at_same,
    followed,
    is_plain,
    moved,
    put,
    shifted,
    viewed,
    within,
    without,
)

# of one output, in how many places the axis is followed
_PLACES = 64
# what takes, or writes, numbers whose places are given by number
_BY_NUMBER = (*BY_DATA, "Scatter", "Masked", "Put", "Sort", "Topk")
_VIEWS = ("View", "UnsafeView", "Reshape", "Alias", "Squeeze", "Unsqueeze")


class TokenAxis:
    """Where the tokens of a source are in the tensors below it.

    tokens: how many dimensions behind the batch they are.
    """

    def __init__(self, source: Tensor, tokens: int) -> None:
        self.found: dict[Output, set[Axis | None]] = {}
        self.single = math.prod(source.shape[1 : 1 + tokens]) == 1
        if source.grad_fn is None or self.single:
            return
        self._varying = _varying(source.grad_fn)
        self._shapes: dict[Node, list[tuple[int, ...]]] = {}
        self._steps = Steps()
        # a dimension of one place may be in any tensor
        sizes = [(d, n) for d, n in enumerate(source.shape[: 1 + tokens]) if d and n > 1]
        start = tuple(Part(d, n, n, (d,), n) for d, n in sizes)
        untold = list[Output]()
        level: list[Place] = [((source.grad_fn, source.output_nr), start)]
        # the shortest paths come first: by longer ones a loop leads to other tokens
        while level:
            below = list[Place]()
            for output, axis in level:
                known = self.found.setdefault(output, set())
                if axis is None or len(known) >= _PLACES:
                    untold.append(output)
                elif axis not in known:
                    known.add(axis)
                    below += self._below(output, axis)
            level = below + self._steps.resolved()
        # below a tensor in which the axis is known, all is
        told = {output for output in self.found if self.is_in(output)}
        for output in walk(untold, lambda output: [] if output in told else _operands(output)):
            if output not in told:
                self.found[output] = {None}

    def _shape(self, output: Output) -> tuple[int, ...]:
        node, number = output
        if node not in self._shapes:
            self._shapes[node] = shapes_of(node)
        return self._shapes[node][number]

    def is_in(self, output: Output, tokens: int = 1) -> bool:
        """Whether the tensor, of so many tokens, has a token for each of the source's, or it cannot be told."""
        if self.single:
            return tokens == 1
        found = self.found.get(output, set())
        if None in found:
            return True
        seen: dict[tuple[int, ...], tuple[int, set[int]]] = {}
        for axis in found:
            if axis is not None and all(part.dim != PICKED for part in axis):
                for part in axis:
                    before = seen.get(part.number, (0, set()))[1]
                    seen[part.number] = part.whole, before | part.shown
        # a shift may lose a token at one end
        return bool(seen) and all(
            2 * len(shown) > len(followed(whole)) for whole, shown in seen.values()
        )

    def _below(self, output: Output, axis: Axis) -> Iterator[Place]:
        """The operands that have the axis, each with where it is."""
        node = output[0]
        parents = [(i, p) for i, p in enumerate(node.next_functions) if _is_made(p)]
        if not parents:
            return
        name, after = node.name(), self._shape(output)
        order = moved_dims(node, len(after))
        if order is not None:
            yield parents[0][1], moved(axis, order)
        elif name.startswith(_VIEWS):
            yield parents[0][1], viewed(axis, after, self._shape(parents[0][1]))
        elif name.startswith(("Select", "Unbind")):
            yield from self._selected(output, parents[0][1], axis)
        elif name.startswith(("Slice", "Split", "ConstantPad")):
            yield from self._cut(output, parents[0][1], axis)
        elif name.startswith("Stack"):
            yield from self._stacked(node, parents, axis, len(after))
        elif name.startswith("Cat"):
            yield from self._joined(node, parents, axis, after)
        elif name.startswith(("Bmm", "Baddbmm", "Mm", "Addmm", "Mv", "Cdist", "EuclideanDist")):
            yield from self._product(node, axis, after)
        elif name.startswith("ScaledDot"):
            yield from self._attention(node, axis, after)
        elif hasattr(node, "_saved_keepdim"):
            yield from self._reduced(node, parents[0][1], axis)
        elif "CopySlices" in name:
            yield from self._written(node, parents, axis, after)
        elif name.startswith(_BY_NUMBER):
            yield from self._numbered(node, parents, axis, after)
        else:
            yield from self._elsewise(parents, axis, after)

    def _numbered(
        self,
        node: Node,
        parents: Sequence[tuple[int, Output]],
        axis: Axis,
        after: Sequence[int],
    ) -> Iterator[Place]:
        """Where numbers are picked along another dimension, the axis stays; elsewhere any token may be picked."""
        dim = getattr(node, "_saved_dim", None)
        along = dim is None or any(p.dim == signed(dim) % len(after) for p in axis)
        for _, parent in parents:
            before = self._shape(parent)
            same = before == tuple(after) or (not along and at_same(axis, before, after))
            yield parent, axis if same else None

    def _elsewise(
        self, parents: Sequence[tuple[int, Output]], axis: Axis, after: Sequence[int]
    ) -> Iterator[Place]:
        """Of an operation on numbers by themselves, with broadcasting, and of those that nothing is known of."""
        lost, kept = list[Output](), False
        for _, parent in parents:
            before = self._shape(parent)
            less = len(after) - len(before)
            broadcast = less >= 0 and all(
                n in (1, m) for n, m in zip(before, after[less:], strict=True)
            )
            if broadcast:
                gone = {d for d, n in enumerate(after) if d < less or before[d - less] != n}
                for own in without(axis, gone):
                    kept = True
                    yield parent, own and shifted(own, -less)
            elif at_same(axis, before, after):
                kept = True
                yield parent, axis
            else:
                lost.append(parent)
        if not kept:
            yield from ((parent, None) for parent in lost)

    def _product(self, node: Node, axis: Axis, after: Sequence[int]) -> Iterator[Place]:
        """The rows are those of the first factor, the columns those of the second, and both have what lies before."""
        *added, first, second = node.next_functions
        if added and _is_made(added[0]):
            yield from self._elsewise([(0, added[0])], axis, after)
        last = len(after) - 1
        distances = node.name().startswith(("Cdist", "Euclid"))
        rows, columns = (
            ({last}, set[int]()) if node.name().startswith("Mv") else ({last - 1}, {last})
        )
        for factor, other, gone in ((first, second, columns), (second, first, rows)):
            own = list(without(axis, gone))
            if not _is_made(factor):
                continue
            if own and own[0] is not None and distances:
                # both factors have them in rows
                own = [moved(own[0], [*range(last), last - 1])]
            elif not own and other[0] not in self._varying:
                # a matrix that no data made mixes the tokens, as a layer along them does
                own = [axis if at_same(axis, self._shape(factor), after) else None]
            yield from ((factor, places) for places in own)

    def _attention(self, node: Node, axis: Axis, after: Sequence[int]) -> Iterator[Place]:
        """Queries have the rows of fused attention, and values its columns."""
        last = len(after) - 1
        query, key, value, *_ = node.next_functions
        missing = ((query, {last}), (key, {last, last - 1}), (value, {last - 1}))
        alone = not {query[0], key[0]} & self._varying
        for factor, gone in missing:
            if _is_made(factor):
                own = [axis] if alone and factor is value else without(axis, gone)
                same = at_same(axis, self._shape(factor), after)
                yield from ((factor, places) for places in own if same)

    def _reduced(self, node: Node, parent: Output, axis: Axis) -> Iterator[Place]:
        """A sum, a mean or a maximum over dimensions: over the axis, all tokens are in each."""
        count = len(self._shape(parent))
        dims = node._saved_dim
        gone = {signed(d) % count for d in ([dims] if isinstance(dims, int) else dims or ())}
        gone = gone or set(range(count))
        left = [d for d in range(count) if node._saved_keepdim or d not in gone]
        yield from ((parent, own) for own in without(moved(axis, left), gone))

    def _selected(self, output: Output, parent: Output, axis: Axis) -> Iterator[Place]:
        """One token of many, perhaps that of this step of a loop."""
        node, number = output
        before = self._shape(parent)
        dim = signed(node._saved_dim) % len(before)
        index = number if node.name().startswith("Unbind") else signed(node._saved_index)
        up = tuple(p._replace(dim=p.dim + 1) if p.dim >= dim else p for p in axis)
        yield from self._steps.take(parent, up, dim, index % before[dim], before[dim])

    def _cut(self, output: Output, parent: Output, axis: Axis) -> Iterator[Place]:
        """A slice, or a tensor with padding: positions count from elsewhere."""
        node, number = output
        before, after = self._shape(parent), self._shape(output)
        if node.name().startswith("ConstantPad"):
            ahead = list(zip(node._saved_pad[::2], node._saved_pad[1::2], strict=True))
            moves = {len(before) - 1 - i: -signed(n) for i, (n, _) in enumerate(ahead)}
        else:
            dim = signed(node._saved_dim) % len(before)
            moves = {dim: _start(node, number, before[dim])}
            if getattr(node, "_saved_step", 1) != 1 and any(part.dim == dim for part in axis):
                yield parent, None
                return
            if after[dim] == 1 and all(part.dim != dim for part in axis):
                yield from self._steps.take(parent, axis, dim, moves[dim], before[dim])
                return
        parts = []
        for part in axis:
            if part.dim != PICKED and before[part.dim] != after[part.dim]:
                if not is_plain(part, axis):
                    yield parent, None
                    return
                at = part.at + moves.get(part.dim, 0)
                inside = within(part._replace(at=at), 0, before[part.dim])
                if inside is None:
                    return
                part = inside
            parts.append(part)
        yield parent, tuple(parts)

    def _stacked(
        self,
        node: Node,
        parents: Sequence[tuple[int, Output]],
        axis: Axis,
        count: int,
    ) -> Iterator[Place]:
        dim = signed(node._saved_dim) % count
        for i, parent in parents:
            along = next((part for part in axis if part.dim == dim), None)
            down = [d - (d > dim) for d in range(count)]
            if along is None:
                yield parent, moved(axis, down)
            elif not is_plain(along, axis):
                yield parent, None
            elif (own := within(along, i, i + 1)) and own.shown:
                yield parent, moved(put(axis, along, own._replace(dim=PICKED)), down)

    def _joined(
        self,
        node: Node,
        parents: Sequence[tuple[int, Output]],
        axis: Axis,
        after: Sequence[int],
    ) -> Iterator[Place]:
        dim = signed(node._saved_dim) % len(after)
        along = [part for part in axis if part.dim == dim]
        if not along:
            yield from ((parent, axis) for _, parent in parents)
            return
        sizes: list[int | None] = [
            None if p[0] is None else self._shape(p)[dim] for p in node.next_functions
        ]
        for i, parent in parents:
            low = _sum(sizes[:i])
            if low is None:
                high = _sum(sizes[i:])
                low = None if high is None else after[dim] - high
            if low is None or not is_plain(along[0], axis):
                yield parent, None
                continue
            own = within(along[0], low, low + (sizes[i] or 0))
            if own is not None and own.shown:
                yield parent, tuple(own if part is along[0] else part for part in axis)

    def _written(
        self,
        node: Node,
        parents: Sequence[tuple[int, Output]],
        axis: Axis,
        after: Sequence[int],
    ) -> Iterator[Place]:
        """A tensor into which another was written, as loops over tokens fill the tensor that they return."""
        step = _writes_before(node)
        for i, parent in parents:
            if i == 0:
                yield parent, axis
                continue
            before = self._shape(parent)
            gone = [d for d in range(len(after)) if (*after[:d], *after[d + 1 :]) == before]
            along = next((part for part in axis if part.dim in gone), None)
            if along is None or not is_plain(along, axis):
                yield parent, None
            elif (own := within(along, along.at + step, along.at + step + 1)) and own.shown:
                down = [d - (d > along.dim) for d in range(len(after))]
                yield parent, moved(put(axis, along, own._replace(dim=PICKED)), down)


def _writes_before(node: Node) -> int:
    """How often something was written into the tensor before."""
    count, below = 0, node.next_functions[0][0]
    while below is not None and "CopySlices" in below.name():
        count, below = count + 1, below.next_functions[0][0]
    return count


def _is_made(output: Output) -> bool:
    """Whether an operation made the tensor, which is no leaf."""
    return output[0] is not None and not is_leaf(output[0])


def _operands(output: Output) -> list[Output]:
    return [parent for parent in output[0].next_functions if _is_made(parent)]


def _varying(root: Node) -> set[Node]:
    """The nodes of what depends on the data: no product but of parameters, and nothing picked by number, makes the others."""
    found = set[Node]()
    for node in reversed(walk([root])):
        if is_leaf(node):
            continue
        factors = [parent for parent, _ in node.next_functions]
        name = node.name()
        # without its bias, which may be None
        factors = factors[-2:] if name.startswith(("Addmm", "Baddbmm")) else factors[:2]
        made = (is_product(node) or "Rnn" in name) and None in factors
        below = (parent for parent, _ in node.next_functions)
        if made or name.startswith(BY_DATA) or any(parent in found for parent in below):
            found.add(node)
    return found


def _start(node: Node, number: int, size: int) -> int:
    """The first position of a slice, or of this part of a split."""
    if node.name().startswith("SplitWithSizes"):
        return sum(node._saved_split_sizes[:number])
    if node.name().startswith("Split"):
        return int(number * node._saved_split_size)
    start = signed(node._saved_start or 0)
    return max(0, start + size if start < 0 else start)


def _sum(sizes: Iterable[int | None]) -> int | None:
    total = 0
    for size in sizes:
        if size is None:
            return None
        total += size
    return total
