"""What `feedbackward cost` is about: nets, rules, operators, and how they are counted or measured."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from feedbackward.errors import AttachError, ConfigError
from feedbackward.experiment import nets
from feedbackward.experiment.config.arguments import parse
from feedbackward.experiment.config.cost import CostConfig
from feedbackward.experiment.config.schema import RuleEntry
from feedbackward.experiment.randomness import seed_everything
from feedbackward.experiment.training.building import (
    find_rule,
    import_from_here,
    in_channels_last,
    make_operator,
    make_rule,
)
from feedbackward.operators import OPERATORS
from feedbackward.rules import RULES, Rule

PLOTS = (".png", ".svg", ".pdf")


def resolved(config: CostConfig) -> CostConfig:
    """The same with the rules written out.

    Raises ConfigError for an unknown name, an option that does not exist, or a value out of range.
    """
    import_from_here()
    if not config.models:
        raise ConfigError("name a model: feedbackward cost vgg16, or package.module:callable")
    for what in ("models", "schedules"):
        given = getattr(config, what)
        if not given or len(set(given)) < len(given):
            raise ConfigError(f"{what} must name at least one, and none twice: got {given}")
    for model in config.models:
        nets.default_sites(model)
    _check_stages(config)
    least = {"rounds": 1, "batch": 1, "size": 1, "channels": 1, "classes": 2, "threads": 1}
    for name, smallest in least.items():
        value = getattr(config, name)
        if value is not None and value < smallest:
            raise ConfigError(f"{name} is {value}: it must be at least {smallest}")
    if config.plot and Path(config.plot).suffix not in PLOTS:
        raise ConfigError(f"plot is '{config.plot}': it must end with {', '.join(PLOTS)}")
    rules = config.rules or (["dfa", "dkp"] if config.measure else ["all"])
    named = itertools.chain(*(RULES if r == "all" else [r] for r in rules))
    entries = [RuleEntry(rule=r) if isinstance(r, str) else r for r in named]
    for entry in entries:
        with contextlib.suppress(AttachError):  # what a rule refuses is reported in its row
            make_rule(entry.rule, entry.options)
    for spec in config.operators:
        with contextlib.suppress(AttachError):
            make_operator(spec)
    return replace(config, rules=[entry for entry in entries if entry.rule != "bp"])


def _check_stages(config: CostConfig) -> None:
    if not config.stages:
        return
    if any(count < 1 for count in config.stages) or config.micro_batches < 1:
        raise ConfigError("stages and micro_batches must be at least 1")
    most = config.batch // 2
    if config.micro_batches > most:
        raise ConfigError(
            f"micro_batches is {config.micro_batches}: a batch of {config.batch} has at most {most} parts of 2"
        )
    if config.measure:
        raise ConfigError("stages and measure are two commands: give one of them")
    if (config.link is not None and config.link <= 0) or config.latency < 0:
        raise ConfigError("link must be above 0, and latency at least 0")


def parse_cost(arguments: Sequence[str]) -> CostConfig:
    """The configuration that the command line describes."""
    return resolved(parse(CostConfig, arguments, "cost"))


@dataclass(frozen=True)
class Choice:
    """A rule with an operator. `operator` is "-" if the rule has no choice."""

    rule: str
    operator: str
    make: Callable[[], Rule]


def choices(config: CostConfig) -> Iterator[Choice]:
    """Every rule of the configuration with every operator that is asked for."""
    for entry in config.rules or ():
        assert isinstance(entry, RuleEntry)
        fields = getattr(find_rule(entry.rule), "__dataclass_fields__", {})
        given = "operator" in entry.options
        label = entry.label or " ".join(
            [entry.rule, *(f"{k}={v}" for k, v in entry.options.items() if k != "operator")]
        )
        several = "operator" in fields and not given and config.operators
        for spec in config.operators if several else [entry.options.get("operator")]:
            options = entry.options if spec is None else {**entry.options, "operator": spec}
            text = _own(fields) if spec is None else _text(spec)
            yield Choice(label, text, lambda e=entry, o=options: make_rule(e.rule, o))  # type: ignore[misc]


def _own(fields: Any) -> str:
    """The name of the operator that a rule has by default."""
    default = getattr(fields.get("operator"), "default", None)
    return next((name for name, kind in OPERATORS.items() if type(default) is kind), "-")


def _text(spec: Any) -> str:
    """An operator's name and options, as they were given."""
    if isinstance(spec, str):
        return spec
    return " ".join([str(spec["name"]), *(f"{k}={v}" for k, v in spec.items() if k != "name")])


class Subject:
    """One net on images of one shape: every copy of it has the same weights."""

    def __init__(self, config: CostConfig, model: str, device: torch.device) -> None:
        self.config, self.model, self.device = config, model, device
        self.shape = (config.channels, config.size, config.size)
        self.sites: Any = nets.default_sites(model) if config.sites is None else config.sites
        if self.sites == "published":
            self.sites = nets.published_sites(model)

    def net(self) -> nn.Module:
        """A fresh network, in training mode."""
        seed_everything(0)
        with torch.device(self.device):
            model = nets.build(
                self.model,
                self.shape,
                self.config.classes,
                norm=self.config.norm,
                options=self.config.model_options,
            )
        model = model.to(self.device)
        if self.config.channels_last and self.device.type != "meta":
            model = in_channels_last(model, self.device)
        return model.train()

    def batch(self) -> tuple[Tensor, Tensor]:
        """Random images and labels."""
        seed_everything(0)
        x = torch.randn(self.config.batch, *self.shape, device=self.device)
        y = torch.randint(self.config.classes, (self.config.batch,), device=self.device)
        return x.to(memory_format=torch.channels_last) if self.config.channels_last else x, y
