"""The ETA of a grid, from what its cells took so far."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class CellTime:
    """What the ETA needs to know of a cell.

    Attributes:
        group: model, data set and folder: the more of these two cells share, the better one's speed
            predicts the other's.
        label: the label of the rule.
        images: training images of the whole cell, over all epochs.
        share: the share of them that is done, 0 to 1.
        measured: the share that `seconds` were spent on.
    """

    group: tuple[str, ...]
    label: str
    images: int
    share: float = 0.0
    measured: float = 0.0
    seconds: float = 0.0


def seconds_left(cells: Sequence[CellTime], workers: int) -> float | None:
    """Seconds until all cells are done by so many at once; None while nothing was measured.

    A cell's speed is that of its rule in its comparison. If none of it has run, it is the speed of all
    rules in the comparison, then on the same model and data, then on the same model, then of all cells.
    """
    known = [cell for cell in cells if cell.measured > 0 and cell.seconds > 0]
    if not known:
        return None
    rates: dict[tuple[str, ...], float] = {}
    for depth in range(len(_keys(cells[0]))):
        for key in {_keys(cell)[depth] for cell in known}:
            rates.setdefault(key, _rate(cell for cell in known if _keys(cell)[depth] == key))
    left = [
        next(rates[key] for key in _keys(cell) if key in rates) * cell.images * (1 - cell.share)
        for cell in cells
    ]
    return max(sum(left) / workers, max(left))


def _keys(cell: CellTime) -> list[tuple[str, ...]]:
    """What the cell's speed may be read from, the best first."""
    model, data, folder = cell.group
    return [
        ("rule", folder, cell.label),
        ("folder", folder),
        ("data", model, data),
        ("model", model),
        (),
    ]


def _rate(cells: Iterable[CellTime]) -> float:
    """Seconds per image."""
    seen = list(cells)
    return sum(cell.seconds for cell in seen) / sum(cell.images * cell.measured for cell in seen)


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
