"""A grid of comparisons, as a YAML file describes it: its sections, and what changes when it is run small."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from feedbackward.errors import ConfigError
from feedbackward.experiment.config.files import check_keys, nested, read_yaml
from feedbackward.experiment.config.schema import CompareConfig
from feedbackward.experiment.config.suggest import hint

GIVEN_ELSEWHERE = ("title", "out", "overwrite")  # keys of a comparison that a grid does not have
OWN = ("title", "about", "sections", "overrides", "scaled", "search_on", "rates")
SECTION_OWN = ("name", "title", "about", "axes", "scaled", "search_on", "rates")

Settings = dict[str, Any]


@dataclass(frozen=True)
class Override:
    """Settings of those comparisons of a grid that fit `when`: a value, or a list of values, for each dotted key."""

    when: Mapping[str, Any]
    settings: Settings

    def fits(self, settings: Mapping[str, Any]) -> bool:
        """Whether the settings of a comparison are among those that this is for."""
        return all(look_up(settings, key) in _listed(value) for key, value in self.when.items())


@dataclass(frozen=True)
class Section:
    """One grid: a comparison for every combination of the axes' values.

    Attributes:
        name: of its folder and its heading.
        axes: the values of each dotted key of a comparison's config, e.g. `data.name` or `norm`.
        settings: what its comparisons have in common, on top of the grid's.
        scaled: settings on top of these when the grid is run small.
    """

    name: str
    title: str
    about: str = ""
    axes: Mapping[str, list[Any]] = field(default_factory=dict)
    settings: Settings = field(default_factory=dict)
    scaled: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Grid:
    """A grid of comparisons as its file has it.

    Attributes:
        settings: of every comparison: any key of its config, and `rates` and `search_on` (docs/grids.md).
        overrides: settings for some models, data sets or other points.
        scaled, scaled_overrides: settings that apply when it is run small.
        text: the file, which is kept with the results.
    """

    name: str
    title: str
    about: str = ""
    settings: Settings = field(default_factory=dict)
    overrides: list[Override] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    scaled: Settings = field(default_factory=dict)
    scaled_overrides: list[Override] = field(default_factory=list)
    text: str = field(repr=False, default="")


def load_grid(file: Path) -> Grid:
    """The grid in a file. Raises ConfigError for what is none."""
    text = file.read_text(encoding="utf-8")
    return make_grid(file.stem, read_yaml(file), f"the config file {file}", text)


def make_grid(name: str, values: Mapping[str, Any], where: str, text: str = "") -> Grid:
    """Make a grid from nested mappings, refusing unknown keys and empty axes."""
    scaled, sections = dict(values.get("scaled") or {}), values.get("sections")
    if not isinstance(sections, list) or not sections:
        raise ConfigError(f"{where}: sections must be a list of at least one grid")
    small = _overrides(scaled.pop("overrides", None), f"{where}, scaled")
    made = [_section(section, where) for section in sections]
    names = [section.name for section in made]
    for one in names:
        if names.count(one) > 1:
            raise ConfigError(f"{where} has two sections with the name '{one}'")
    return Grid(
        name=name,
        title=str(values.get("title") or name),
        about=_one_line(values.get("about")),
        settings=_settings(values, OWN, where),
        overrides=_overrides(values.get("overrides"), where),
        sections=made,
        scaled=_settings(scaled, (), f"{where}, scaled"),
        scaled_overrides=small,
        text=text,
    )


def _section(values: Any, where: str) -> Section:
    if not isinstance(values, Mapping) or not values.get("name"):
        raise ConfigError(f"{where}: each of the sections needs a name")
    name, axes = str(values["name"]), values.get("axes") or {}
    where = f"{where}, section '{name}'"
    if not isinstance(axes, Mapping):
        raise ConfigError(
            f"{where}: axes are written as {{model: [vgg16, alexnet], norm: [true, false]}}"
        )
    for key, given in axes.items():
        check_keys(CompareConfig, nested(key, None), f"{where}, axes,")
        if key in (*GIVEN_ELSEWHERE, "rules", "seeds"):
            raise ConfigError(f"{where}: '{key}' is no axis: give it as a setting of the section")
        if not isinstance(given, list) or not given:
            raise ConfigError(f"{where}: the axis '{key}' needs a list of values")
    return Section(
        name=name,
        title=str(values.get("title") or name),
        about=_one_line(values.get("about")),
        axes=dict(axes),
        settings=_settings(values, SECTION_OWN, where),
        scaled=_settings(dict(values.get("scaled") or {}), (), f"{where}, scaled"),
    )


def _settings(values: Mapping[str, Any], own: tuple[str, ...], where: str) -> Settings:
    """The keys of a comparison's config among `values`, with `rates` and `search_on`; the others must be `own`."""
    extra = ("rates", "search_on")
    found = {key: value for key, value in values.items() if key not in own and key not in extra}
    for key in GIVEN_ELSEWHERE:
        if key in found:
            raise ConfigError(f"{where}: '{key}' cannot be set here")
    known = {f.name for f in dataclasses.fields(CompareConfig)} - {*GIVEN_ELSEWHERE} | {
        *own,
        *extra,
    }
    for key in found:
        if key not in known:
            raise ConfigError(f"{where} has an unknown key '{key}': {hint(str(key), known)}")
    check_keys(CompareConfig, found, where)
    rates, search_on = values.get("rates") or {}, values.get("search_on") or {}
    for rule, given in rates.items():
        if not isinstance(given, Mapping) or not {"lr", "feedback_lr"} >= {*given}:
            raise ConfigError(
                f"{where}: the rates of {rule} are written as {{lr: 0.02, feedback_lr: 0.002}}"
            )
    for key in search_on:
        check_keys(CompareConfig, nested(key, None), f"{where}, search_on,")
    return found | {
        key: value for key, value in (("rates", rates), ("search_on", search_on)) if value
    }


def _overrides(given: Any, where: str) -> list[Override]:
    if given is None:
        return []
    if not isinstance(given, list) or not all(
        isinstance(g, Mapping) and g.get("when") for g in given
    ):
        raise ConfigError(
            f"{where}: overrides are a list of {{when: {{model: vgg16}}, epochs: 30}}, with any keys of a comparison"
        )
    for one in given:
        for key in one["when"]:
            check_keys(CompareConfig, nested(key, None), f"{where}, overrides, when,")
    return [
        Override(dict(one["when"]), _settings(one, ("when",), f"{where}, overrides"))
        for one in given
    ]


def look_up(settings: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key; None where it is not set."""
    value: Any = settings
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _one_line(text: Any) -> str:
    return " ".join(str(text or "").split())
