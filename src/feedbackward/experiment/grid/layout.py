"""How a section's comparisons are laid out: a table per combination of all axes but one, which has the columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from feedbackward.experiment.grid.plan import Block, Plan, in_words

NAMES = {
    "fashion-mini": "Fashion-MNIST (embedded)",
    "fashion-mnist": "Fashion-MNIST",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "tiny-imagenet": "Tiny ImageNet",
    "small_cnn": "small CNN",
    "alexnet": "AlexNet-BN",
    "vgg6": "VGG-6-BN",
    "vgg11": "VGG-11-BN",
    "vgg13": "VGG-13-BN",
    "vgg16": "VGG-16-BN",
}
SITES = {
    "layers": "all layers",
    "stages": "ends of stages",
    "blocks": "blocks",
    "published": "published sites",
}


@dataclass(frozen=True)
class Table:
    """The comparisons (columns) and rules (rows) of one table, and what all its comparisons have in common."""

    title: str
    section: str
    blocks: tuple[Block, ...]

    @property
    def labels(self) -> list[str]:
        """Every rule of a comparison in it, in order."""
        return list(dict.fromkeys(label for block in self.blocks for label in block.labels))


def tables(plan: Plan) -> list[Table]:
    """The tables of all sections, in order."""
    found = []
    for section in plan.grid.sections:
        axis = column_axis(section.axes)
        groups: dict[str, list[Block]] = {}
        for block in plan.blocks:
            if block.section == section.name:
                title = ", ".join(pretty(k, v) for k, v in block.point.items() if k != axis)
                groups.setdefault(title, []).append(block)
        for title, blocks in groups.items():
            found.append(Table(title or _what(plan, blocks[0], axis), section.name, tuple(blocks)))
    return found


def column_axis(axes: Mapping[str, Any]) -> str | None:
    """The axis with the columns: the data set where it is one, else the last."""
    return "data.name" if "data.name" in axes else [*axes][-1] if axes else None


def column_name(plan: Plan, block: Block) -> str:
    """What heads a block's column: its place on the column axis, else its data set."""
    section = next(s for s in plan.grid.sections if s.name == block.section)
    axis = column_axis(section.axes)
    return (
        pretty(axis, block.point[axis])
        if axis
        else pretty("data.name", plan.of(block).config.data.name)
    )


def _what(plan: Plan, block: Block, axis: str | None) -> str:
    """Model and data of a section that has neither as an axis."""
    config = plan.of(block).config
    parts = [pretty("model", config.model)]
    return ", ".join(
        parts if axis == "data.name" else [*parts, pretty("data.name", config.data.name)]
    )


def pretty(key: str, value: Any) -> str:
    """A setting as a heading."""
    if key in ("model", "data.name"):
        return NAMES.get(str(value), in_words(key, value))
    if key == "norm":
        return "batch norm" if value else "no batch norm"
    if key == "sites" and isinstance(value, str):
        ordinal = {"2": "second", "3": "third", "4": "fourth"}
        number = value.removeprefix("every-")
        return SITES.get(
            value, f"every {ordinal.get(number, number + 'th')} layer" if number != value else value
        )
    return in_words(key, value)


def title(plan: Plan, block: Block) -> str:
    """A comparison in words; empty if there is only one."""
    if plan.single:
        return ""
    config = plan.of(block).config
    point = {"model": config.model, "data.name": config.data.name} | block.point
    return ", ".join(pretty(key, value) for key, value in point.items())
