"""Numbers of `feedbackward cost` as text, and the kinds of multiply-adds that it tells apart."""

from __future__ import annotations

# of multiply-adds: field, heading in the table, name in the figure, colour
KINDS = (
    ("forward", "forward", "forward", "#7d858e"),
    ("weight_gradients", "weight gr.", "weight gradients", "#1b7bbd"),
    ("input_gradients", "input gr.", "input gradients", "#d55e00"),
    ("feedback", "signals", "feedback signals", "#009e73"),
    ("learning", "learn B", "learning of feedback", "#b0568f"),
    ("auxiliary", "aux.", "auxiliary nets", "#a07a00"),
)
ALWAYS = 4  # of these have a column, the others where a rule has any
SCHEDULES = (("joint", "#1b7bbd", "o"), ("replay", "#d55e00", "s"), ("eager", "#009e73", "D"))


def unit(largest: int) -> tuple[float, str, str]:
    """A unit in which the largest number is at least one."""
    units = ((1e12, "T", "trillions"), (1e9, "G", "billions"), (1e6, "M", "millions"))
    return next((found for found in units if largest >= found[0]), (1e3, "k", "thousands"))


def scaled(count: int | None, size: float) -> str:
    if not count:
        return "-" if count is None else "0"
    return f"{count / size:#.3g}" if count < 100 * size else f"{count / size:.0f}"


def sized(count: int | None) -> str:
    if count is None:
        return "-"
    size, name = next(
        (u for u in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")) if count >= u[0]), (1, "B")
    )
    return f"{count / size:.0f} {name}" if size == 1 else f"{count / size:.1f} {name}"
