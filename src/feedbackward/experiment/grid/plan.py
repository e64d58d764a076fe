"""The comparisons that a grid stands for: every point of every section, each comparison once."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from feedbackward.errors import ConfigError
from feedbackward.experiment.config.arguments import validated
from feedbackward.experiment.config.files import merged, nested, to_dict, write_yaml
from feedbackward.experiment.config.schema import CompareConfig, RuleEntry, slug
from feedbackward.experiment.grid.candidates import Candidate, find_candidates
from feedbackward.experiment.grid.definition import Grid, Section, Settings, look_up


@dataclass(frozen=True)
class Options:
    """How a grid is run.

    Attributes:
        out: the folder of the results.
        scale: the share of the training images; below 1, the grid's `scaled` settings apply.
        changes: settings of the command line, which every comparison takes.
        executor: what runs the cells.
    """

    out: str
    scale: float = 1.0
    changes: Mapping[str, Any] = field(default_factory=dict)
    executor: str = "local"

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 1:
            raise ConfigError(
                f"the scale is {self.scale:g}: it is a share of the training images, above 0 and "
                "at most 1"
            )


@dataclass(frozen=True)
class Comparison:
    """One folder of runs: rules and seeds under one recipe, on one model and data set.

    Attributes:
        search_on: the folder of the comparison whose search picks the rates of this one, which may
            be its own; None without a search.
    """

    folder: str
    config: CompareConfig
    search_on: str | None = None

    @property
    def candidates(self) -> list[Candidate]:
        """Its rules, the baseline first, without the rates that a search picks."""
        return find_candidates(self.config)

    def candidate(self, label: str) -> Candidate | None:
        """The rule of this label, if it is compared here."""
        return next((c for c in self.candidates if c.label == label), None)


@dataclass(frozen=True)
class Block:
    """One point of a section's grid: a comparison, or a part of one that another section has already."""

    section: str
    point: dict[str, Any]
    folder: str
    labels: tuple[str, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """A grid written out: its blocks in order, and by folder the comparisons that have their runs."""

    grid: Grid
    options: Options
    blocks: tuple[Block, ...]
    comparisons: dict[str, Comparison]

    def of(self, block: Block) -> Comparison:
        """The comparison of a block."""
        return self.comparisons[block.folder]

    @property
    def single(self) -> bool:
        """Whether it is one comparison that lies in the folder of the results itself."""
        return [*self.comparisons] == [""]

    @property
    def device(self) -> str:
        """Where to train."""
        return next(iter(self.comparisons.values())).config.device

    @property
    def processes(self) -> int:
        """How many a cell takes at most."""
        return max(c.config.parallel.processes for c in self.comparisons.values())


def single(config: CompareConfig, scale: float = 1.0, executor: str = "local") -> Plan:
    """One comparison as a grid of one cell. Raises ConfigError for a config that is not valid."""
    config = config.resolved()
    assert config.out is not None
    labels = tuple(candidate.label for candidate in find_candidates(config))
    name = Path(config.data.name).name
    grid = Grid(
        name=Path(config.out).name,
        title=config.title or f"{config.model} on {name}",
        sections=[Section(name="", title="")],
        text=write_yaml(config),
    )
    block = Block("", {}, "", labels, tuple(config.seeds))
    comparison = Comparison("", config, "" if config.search.run else None)
    return Plan(grid, Options(config.out, scale, executor=executor), (block,), {"": comparison})


def expand(grid: Grid, options: Options) -> Plan:
    """Write out every section's points. Raises ConfigError for a value that no comparison can have."""
    blocks: list[Block] = []
    comparisons: dict[str, Comparison] = {}
    known: dict[str, str] = {}
    for section in grid.sections:
        for point in _points(section):
            settings = _settings(grid, section, point, options)
            config, search_on = _config(
                settings, f"the grid '{grid.name}', section '{section.name}'"
            )
            identity = json.dumps(
                to_dict(replace(config, rules=[], seeds=[], out=None)) | {"on": search_on},
                sort_keys=True,
            )
            folder = known.setdefault(identity, _folder(section, point, set(known.values())))
            config = replace(config, out=str(Path(options.out) / folder))
            labels = tuple(candidate.label for candidate in find_candidates(config))
            blocks.append(Block(section.name, point, folder, labels, tuple(config.seeds)))
            made = Comparison(folder, config, json.dumps(search_on) if config.search.run else None)
            comparisons[folder] = (
                _union(comparisons[folder], made) if folder in comparisons else made
            )
    return Plan(grid, options, tuple(blocks), _searches(blocks, comparisons))


def _points(section: Section) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*section.axes.values()):
        yield dict(zip(section.axes, values, strict=True))


def _settings(grid: Grid, section: Section, point: Mapping[str, Any], options: Options) -> Settings:
    """The settings of one comparison: of the grid, overrides, section and point; the scaled ones if it
    is run small; then those of the command line."""
    at: Settings = {}
    for key, value in point.items():
        at = merged(at, nested(key, value))
    full = merged(merged(grid.settings, section.settings), at)
    settings = grid.settings
    for override in grid.overrides:
        if override.fits(full):
            settings = merged(settings, override.settings)
    settings = merged(settings, section.settings)
    if options.scale < 1:
        settings = merged(settings, grid.scaled)
        for override in grid.scaled_overrides:
            if override.fits(full):
                settings = merged(settings, override.settings)
        settings = merged(settings, section.scaled)
    settings = merged(settings, at)
    return merged(settings, options.changes)


def _config(settings: Settings, where: str) -> tuple[CompareConfig, dict[str, Any]]:
    rates, search_on = settings.get("rates", {}), settings.get("search_on", {})
    values = {"tensorboard": False} | {
        k: v for k, v in settings.items() if k not in ("rates", "search_on")
    }
    config = validated(CompareConfig, values, where).resolved()
    entries = [_rated(entry, rates) for entry in config.entries()]
    return replace(config, rules=list(entries), out=None), search_on


def _rated(entry: RuleEntry, rates: Mapping[str, Any]) -> RuleEntry:
    """The entry with the rates for its label, or else for its rule."""
    return replace(entry, **rates.get(entry.label or "", rates.get(entry.rule, {})))


def in_words(key: str, value: Any) -> str:
    """A point's value as names of folders have it, and as people can read it."""
    if key == "data.name":
        return Path(str(value)).name
    if key == "model":
        return str(value)
    name = key.removeprefix("forward.").removeprefix("data.").replace(".", " ")
    return f"{name} {str(value).lower() if isinstance(value, bool) else value}"


def _folder(section: Section, point: Mapping[str, Any], taken: set[str]) -> str:
    name = "-".join(slug(in_words(key, value)) for key, value in point.items())[:80] or "all"
    numbers = itertools.chain([""], (f"-{n}" for n in itertools.count(2)))
    return next(f for n in numbers if (f := f"{slug(section.name)}/{name}{n}") not in taken)


def _union(first: Comparison, second: Comparison) -> Comparison:
    """The same comparison with the rules and seeds of both."""
    entries = {candidate.label: candidate.entry for candidate in first.candidates}
    for candidate in second.candidates:
        if entries.setdefault(candidate.label, candidate.entry) != candidate.entry:
            raise ConfigError(
                f"two sections give different options or rates to '{candidate.label}' in {first.folder}: give it another label"
            )
    seeds = [*first.config.seeds, *(s for s in second.config.seeds if s not in first.config.seeds)]
    return replace(first, config=replace(first.config, rules=list(entries.values()), seeds=seeds))


def _searches(
    blocks: Sequence[Block], comparisons: Mapping[str, Comparison]
) -> dict[str, Comparison]:
    """Each comparison with the folder of the search that picks its rates."""
    found = {}
    for folder, comparison in comparisons.items():
        if comparison.search_on is not None:
            wanted = json.loads(comparison.search_on)
            own = next(block for block in blocks if block.folder == folder)
            on = _sibling(own, wanted, blocks, comparisons)
            comparison = replace(comparison, search_on=on)
        found[folder] = comparison
    return found


def _sibling(
    own: Block,
    wanted: Mapping[str, Any],
    blocks: Sequence[Block],
    comparisons: Mapping[str, Comparison],
) -> str:
    """The folder of the block of the same section and point but for what is wanted."""
    if all(
        look_up(to_dict(comparisons[own.folder].config), key) == value
        for key, value in wanted.items()
    ):
        return own.folder
    for block in blocks:
        same = all(
            value == own.point.get(key) for key, value in block.point.items() if key not in wanted
        )
        there = to_dict(comparisons[block.folder].config)
        if (
            block.section == own.section
            and same
            and all(look_up(there, k) == v for k, v in wanted.items())
        ):
            return block.folder
    told = ", ".join(f"{key}: {value}" for key, value in wanted.items())
    raise ConfigError(
        f"section '{own.section}' has no comparison with {told} beside {own.folder}: mend search_on"
    )
