"""From a study to its comparisons: the grid of every section, written out, each comparison once."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from feedbackward.errors import ConfigError
from feedbackward.experiment.config.arguments import validated
from feedbackward.experiment.config.files import to_dict
from feedbackward.experiment.config.schema import CompareConfig, RuleEntry, slug
from feedbackward.experiment.grid.compare import Contender, find_contenders
from feedbackward.experiment.grid.definition import (
    Section,
    Settings,
    Study,
    look_up,
    merged,
    nested,
)


@dataclass(frozen=True)
class Options:
    """How a study is run.

    Attributes:
        out: the folder of its results.
        scale: share of the training images; below 1 the study's `scaled` settings count.
        sets: dotted keys of a comparison's config and values, for all of them.
        root, device: of the data and of the training, for all of them.
    """

    out: str
    scale: float = 1.0
    sets: Mapping[str, Any] | None = None
    root: str | None = None
    device: str | None = None


@dataclass(frozen=True)
class Comparison:
    """One folder of cells: rules and seeds under one recipe, on one model and data set.

    `search_on` is the folder of the comparison whose search picks the rates of this one; its own, or None without a search.
    """

    folder: str
    config: CompareConfig
    search_on: str | None = None

    @property
    def contenders(self) -> list[Contender]:
        """Its rules, the baseline first, without the rates that a search picks."""
        return find_contenders(self.config)


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
    """A study written out: its blocks in order, and the comparisons that they take their cells from, by folder."""

    study: Study
    options: Options
    blocks: tuple[Block, ...]
    comparisons: dict[str, Comparison]

    def of(self, block: Block) -> Comparison:
        """The comparison of a block."""
        return self.comparisons[block.folder]


def expand(study: Study, options: Options) -> Plan:
    """Write out every section's grid. Raises ConfigError for a value that no comparison can have."""
    if not 0 < options.scale <= 1:
        raise ConfigError(
            f"the scale is {options.scale:g}: it is a share of the training images, above 0 and at most 1"
        )
    blocks: list[Block] = []
    comparisons: dict[str, Comparison] = {}
    known: dict[str, str] = {}
    for section in study.sections:
        for point in _points(section):
            settings = _settings(study, section, point, options)
            config, search_on = _config(
                settings, f"the study '{study.name}', section '{section.name}'"
            )
            identity = json.dumps(
                to_dict(replace(config, rules=[], seeds=[], out=None)) | {"on": search_on},
                sort_keys=True,
            )
            folder = known.setdefault(identity, _folder(section, point, set(known.values())))
            config = replace(config, out=str(Path(options.out) / folder))
            labels = tuple(contender.label for contender in find_contenders(config))
            blocks.append(Block(section.name, point, folder, labels, tuple(config.seeds)))
            made = Comparison(folder, config, json.dumps(search_on) if config.search.run else None)
            comparisons[folder] = (
                _union(comparisons[folder], made) if folder in comparisons else made
            )
    return Plan(study, options, tuple(blocks), _searches(blocks, comparisons))


def _points(section: Section) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*section.axes.values()):
        yield dict(zip(section.axes, values, strict=True))


def _settings(
    study: Study, section: Section, point: Mapping[str, Any], options: Options
) -> Settings:
    """The settings of one comparison: study, overrides, section, point; when small the scaled ones; what was asked for."""
    at: Settings = {}
    for key, value in point.items():
        at = merged(at, nested(key, value))
    full = merged(merged(study.settings, section.settings), at)
    settings = study.settings
    for override in study.overrides:
        if override.fits(full):
            settings = merged(settings, override.settings)
    settings = merged(settings, section.settings)
    if options.scale < 1:
        settings = merged(settings, study.scaled)
        for override in study.scaled_overrides:
            if override.fits(full):
                settings = merged(settings, override.settings)
        settings = merged(settings, section.scaled)
    settings = merged(settings, at)
    asked = {"data.root": options.root, "device": options.device} | dict(options.sets or {})
    for key, value in asked.items():
        if value is not None:
            settings = merged(settings, nested(key, value))
    return settings


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
    entries = {contender.label: contender.entry for contender in first.contenders}
    for contender in second.contenders:
        if entries.setdefault(contender.label, contender.entry) != contender.entry:
            raise ConfigError(
                f"two sections give different options or rates to '{contender.label}' in {first.folder}: give it another label"
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
