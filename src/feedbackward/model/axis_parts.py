"""An axis of tokens in a tensor: along which dimensions its parts lie, and where views and moves of dimensions put them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

from feedbackward.model.autograd_graph import Output

# the dimension of a part of the axis of which one token was picked
PICKED = -1


class Part(NamedTuple):
    """A part of the axis in a tensor: `size` tokens from number `first` of `whole`.

    dim: the dimension along which they lie. at, room: they begin at this one of so many places, the others of which are for
    other tokens. inner: how far one place is from the next, where a view put more dimensions into one. number: which part it is.
    """

    dim: int
    size: int
    whole: int
    number: tuple[int, ...]
    room: int
    first: int = 0
    at: int = 0
    inner: int = 1

    @property
    def shown(self) -> set[int]:
        """Which tokens of those that are followed through loops it has."""
        return {i for i in followed(self.whole) if self.first <= i < self.first + self.size}


Axis = tuple[Part, ...]

# a tensor, and where the axis is in it: None is somewhere, through an operation that does not say where
Place = tuple[Output, Axis | None]


def followed(whole: int) -> set[int]:
    """The tokens that are followed through a loop over so many."""
    return {0, whole // 2, whole - 1}


def moved(axis: Axis, order: Sequence[int]) -> Axis:
    """Each dimension is where the order says."""
    return tuple(p if p.dim == PICKED else p._replace(dim=order[p.dim]) for p in axis)


def shifted(axis: Axis, by: int) -> Axis:
    return tuple(p if p.dim == PICKED else p._replace(dim=p.dim + by) for p in axis)


def at_same(axis: Iterable[Part], before: Sequence[int], after: Sequence[int]) -> bool:
    """Whether the dimensions of the axis are of the same size in both shapes."""
    dims = [part.dim for part in axis if part.dim != PICKED]
    if len(before) == len(after):
        return all(before[d] == after[d] for d in dims)
    reach = max(dims, default=-1) + 1
    return len(before) >= reach and tuple(before[:reach]) == tuple(after[:reach])


def is_plain(part: Part, axis: Iterable[Part]) -> bool:
    """Whether the part alone lies along its dimension."""
    return part.inner == 1 and sum(other.dim == part.dim for other in axis) == 1


def within(part: Part, low: int, high: int) -> Part | None:
    """What of a part lies in these places of its dimension, which are all that there are."""
    start, end = max(part.at, low), min(part.at + part.size, high)
    if start >= end:
        return None
    first = part.first + start - part.at
    return part._replace(at=start - low, size=end - start, first=first, room=high - low)


def viewed(axis: Axis, after: Sequence[int], before: Sequence[int]) -> Axis | None:
    """The axis in a tensor that was viewed in another shape, where a dimension is a range of strides; None if it is no such range."""
    if math.prod(after) != math.prod(before):
        return None
    parts: list[Part] = []
    for part in axis:
        found = [part] if part.dim == PICKED else _in_view(part, after, before)
        if found is None:
            return None
        parts += found
    return tuple(parts)


def _in_view(part: Part, after: Sequence[int], before: Sequence[int]) -> list[Part] | None:
    d, strides = part.dim, [math.prod(before[i + 1 :]) for i in range(len(before))]
    stride = math.prod(after[d + 1 :])
    same = [i for i, n in enumerate(before) if n == after[d] and strides[i] == stride]
    if same:
        # of several dimensions of size 1 the one at the same place
        return [part._replace(dim=d if d in same else same[0])]
    if after[d] == 1:
        return [part._replace(dim=PICKED)]
    low, high = stride * part.inner, stride * part.inner * part.room
    found = []
    for i, n in enumerate(before):
        start, end = max(low, strides[i]), min(high, strides[i] * n)
        if start < end:
            if start % strides[i] or end % start:
                return None
            size, number = end // start, (*part.number, start)
            found.append(Part(i, size, size, number, size, inner=start // strides[i]))
    if len(found) == 1 and found[0].room == part.room:
        return [part._replace(dim=found[0].dim, inner=found[0].inner)]
    if not found or math.prod(p.room for p in found) != part.room:
        return None
    last = found[-1]
    if part.at // last.room == (part.at + part.size - 1) // last.room:
        # within one row of what was split
        at = part.at % last.room
        return [part._replace(dim=last.dim, inner=last.inner, at=at, room=last.room)]
    return found if part.size == part.room == part.whole else None


def without(axis: Axis, gone: Collection[int]) -> Iterator[Axis | None]:
    """The axis in an operand that does not have these dimensions: not in it, or perhaps in it where a part is left.

    A token that was made of half as many is still somewhere.
    """
    lost = [part.dim in gone for part in axis]
    if not any(lost):
        yield axis
    elif not all(lost):
        yield None


def put(axis: Axis, part: Part, other: Part) -> Axis:
    """The axis with another part in place of this one."""
    return tuple(other if each is part else each for each in axis)


class _Taking(NamedTuple):
    """One token that was taken from `room` of them, along a dimension of a tensor in which the axis is so."""

    axis: Axis
    dim: int
    number: int
    room: int


class Steps:
    """Loops over tokens: whether a step takes the token of its own number from a tensor.

    Of the steps before it gets other tokens too, by longer paths. What takes all tokens by paths of one length takes none in
    particular, as a step does that begins with the last state of an encoder.
    """

    def __init__(self) -> None:
        # by tensor and step, what was taken at the present depth
        self._taken: dict[tuple[Output, Part], list[_Taking]] = {}
        self._before = set[tuple[Output, Part]]()

    def take(self, parent: Output, axis: Axis, dim: int, number: int, room: int) -> list[Place]:
        """One token is taken from a dimension of the parent; where the axis is in it if that is known at once."""
        step = next((p for p in axis if p.dim == PICKED and room >= p.whole), None)
        if step is None:
            return [(parent, axis)]
        self._taken.setdefault((parent, step), []).append(_Taking(axis, dim, number, room))
        return []

    def resolved(self) -> list[Place]:
        """Where the axis is in the tensors from which tokens were taken at this depth."""
        places = list[Place]()
        for (parent, step), takings in self._taken.items():
            numbers = {taking.number for taking in takings}
            few = len(numbers) == 1 or 2 * len(numbers) <= takings[0].room
            own = few and (parent, step) not in self._before
            self._before.add((parent, step))
            for axis, dim, number, room in takings:
                if own and number == step.first:
                    axis = put(axis, step, step._replace(dim=dim, at=number, room=room))
                places.append((parent, axis))
        self._taken.clear()
        return places
