"""What `feedbackward cost` counts: the configuration, and a row for every rule and operator of it.

Costs are counted, not measured: no image is read and no time is taken (for that see benching.py and costs.py).
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from feedbackward.errors import AttachError, ConfigError, FeedbackError
from feedbackward.experiment import nets
from feedbackward.experiment.config.arguments import parse
from feedbackward.experiment.config.schema import RuleEntry
from feedbackward.experiment.training.building import (
    find_rule,
    import_from_here,
    make_operator,
    make_rule,
)
from feedbackward.learner import attach
from feedbackward.measure.cost import Cost, count_cost
from feedbackward.rules import BP, RULES, Rule

PLOTS = (".png", ".svg", ".pdf")


@dataclass(frozen=True, kw_only=True)
class CostConfig:
    """Multiply-adds, bytes and steps in sequence of one training step, by rule and operator, beside backprop's.

    Attributes:
        model: a net, or package.module:callable; also as the first argument, without a flag.
        rules: names, entries with rule, label, options, or `all`.
        operators: forms of the feedback, for the rules that have a choice.
        sites: layers, blocks, published, a list of module names; by default the net's own choice.
        error_at: module whose output's error is sent; by default the net's output.
        norm: batch norm in the named nets.
        classes: outputs of the net.
        channels: of an image.
        size: height and width of an image.
        batch: images per step.
        json: file for all numbers.
        plot: file for a figure, .png, .svg or .pdf.
    """

    model: str | None = None
    rules: list[str | RuleEntry] = field(default_factory=lambda: ["all"])
    operators: list[str | dict[str, Any]] = field(default_factory=lambda: ["dense"])
    sites: str | list[str] | None = None
    error_at: str | None = None
    norm: bool = True
    classes: int = 10
    channels: int = 3
    size: int = 32
    batch: int = 64
    json: str | None = None
    plot: str | None = None

    def resolved(self) -> CostConfig:
        """The same with the rules written out.

        Raises ConfigError for an unknown name, an option that does not exist, or a value out of range.
        """
        import_from_here()
        if self.model is None:
            raise ConfigError("name a model: feedbackward cost vgg16, or package.module:callable")
        nets.default_sites(self.model)
        for name, least in {"batch": 1, "size": 1, "channels": 1, "classes": 2}.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least {least}")
        if self.plot and Path(self.plot).suffix not in PLOTS:
            raise ConfigError(f"plot is '{self.plot}': it must end with {', '.join(PLOTS)}")
        named = itertools.chain(*(RULES if r == "all" else [r] for r in self.rules))
        entries = [RuleEntry(rule=r) if isinstance(r, str) else r for r in named]
        for entry in entries:
            with contextlib.suppress(AttachError):  # what a rule refuses is told in its row
                make_rule(entry.rule, entry.options)
        for spec in self.operators:
            with contextlib.suppress(AttachError):
                make_operator(spec)
        return replace(self, rules=[entry for entry in entries if entry.rule != "bp"])


def parse_cost(arguments: Sequence[str]) -> CostConfig:
    """The configuration that the command line describes: the model first, then flags."""
    models = list(itertools.takewhile(lambda a: not a.startswith("-"), arguments))
    if len(models) > 1:
        raise ConfigError(f"one model at a time, not {' and '.join(models)}")
    flags = [f"--model={model}" for model in models] + list(arguments[len(models) :])
    about = "Multiply-adds, bytes and steps in sequence of one training step, by rule and operator."
    return parse(CostConfig, flags, "feedbackward cost MODEL", about).resolved()


@dataclass(frozen=True)
class Row:
    """What a rule with an operator costs, or why it cannot be had."""

    rule: str
    operator: str  # "-" where the rule has no choice
    cost: Cost | None
    refused: str | None = None

    @property
    def name(self) -> str:
        return self.rule if self.operator == "-" else f"{self.rule}, {self.operator}"


def count_rows(config: CostConfig, tell: Callable[[str], Any] = lambda name: None) -> list[Row]:
    """Backprop's row, then one per rule and operator. `tell` is given each row's name before it is counted.

    Raises FeedbackError where backprop itself cannot be counted on the model.
    """
    counter, first = _start(config)
    rows = [first]
    for entry in config.rules:
        assert isinstance(entry, RuleEntry)
        for operator, make in _choices(entry, config.operators):
            label = entry.label or " ".join(
                [entry.rule, *(f"{k}={v}" for k, v in entry.options.items() if k != "operator")]
            )
            tell(label)
            try:
                rows.append(Row(label, operator, counter.cost(make())))
            except (
                FeedbackError,
                ValueError,
            ) as error:  # torch's layers raise ValueError for a batch of one
                rows.append(Row(label, operator, None, str(error)))
    return rows


def _choices(entry: RuleEntry, specs: Sequence[Any]) -> Iterator[tuple[str, Callable[[], Rule]]]:
    """The operators to count a rule with: what they are called, and the rule."""
    if "operator" not in getattr(find_rule(entry.rule), "__dataclass_fields__", {}):
        yield "-", lambda: make_rule(entry.rule, entry.options)
        return
    for spec in [entry.options["operator"]] if "operator" in entry.options else specs:
        options = {**entry.options, "operator": spec}
        yield _text(spec), lambda options=options: make_rule(entry.rule, options)  # type: ignore[misc]


def _text(spec: Any) -> str:
    """An operator's name and options, as they were given."""
    if isinstance(spec, str):
        return spec
    return " ".join([str(spec["name"]), *(f"{k}={v}" for k, v in spec.items() if k != "name")])


class _Counter:
    """Counts rules on one net."""

    def __init__(self, config: CostConfig, device: str) -> None:
        assert config.model is not None
        shape = (config.channels, config.size, config.size)
        with torch.device(device):
            self.model: nn.Module = nets.build(
                config.model, shape, config.classes, norm=config.norm
            )
            self.example: Tensor = torch.zeros(config.batch, *shape)
        self.error_at = config.error_at
        self.sites: Any = nets.default_sites(config.model) if config.sites is None else config.sites
        if self.sites == "published":
            self.sites = nets.published_sites(config.model)

    def cost(self, rule: Rule) -> Cost:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "once", category=UserWarning
            )  # of the net, as every rule finds it
            warnings.filterwarnings(
                "ignore", message="the feedback weights take"
            )  # the table says it
            learner = attach(
                self.model, rule, example=self.example, sites=self.sites, error_at=self.error_at
            )
            try:
                return count_cost(learner, self.example)
            finally:
                learner.detach()


def _start(config: CostConfig) -> tuple[_Counter, Row]:
    """A counter that works, and backprop's row: without values, and where a model needs them, on the CPU."""
    try:
        counter = _Counter(config, "meta")
        return counter, Row("bp", "-", counter.cost(BP()))
    except ConfigError:
        raise
    except Exception:  # whatever a model of the user's own does without values
        counter = _Counter(config, "cpu")
        return counter, Row("bp", "-", counter.cost(BP()))
