"""From names in a config to a rule, a device and a learner."""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import MISSING
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from feedbackward.attaching import attach
from feedbackward.errors import ConfigError
from feedbackward.experiment import nets
from feedbackward.experiment.config.option_types import check_types
from feedbackward.experiment.config.schema import TrainConfig
from feedbackward.experiment.config.suggest import hint
from feedbackward.experiment.data.dataset import DataConfig
from feedbackward.experiment.imported import imported
from feedbackward.experiment.randomness import seed_everything
from feedbackward.experiment.tasks import TASKS, AnyData
from feedbackward.learner import Learner
from feedbackward.model.example import run
from feedbackward.operators import OPERATORS, Operator
from feedbackward.rules import COMPOSED, RULES, Flipped, Mixed, Rule


def find_rule(name: str) -> type[Rule]:
    """The rule called ``name``, or the class ``package.module:Class``. Raises ConfigError for others."""
    named = {**RULES, **COMPOSED}
    if name in named:
        return named[name]
    if ":" not in name:
        raise ConfigError(f"unknown rule '{name}': {hint(name, named)} (or package.module:Class)")
    found = imported(name, "rule")
    if not (isinstance(found, type) and issubclass(found, Rule)):
        raise ConfigError(f"'{name}' is not a subclass of feedbackward.Rule")
    return found


def make_rule(name: str, options: dict[str, Any]) -> Rule:
    """The rule with its options. Raises ConfigError for an option it does not have."""
    kind = find_rule(name)
    fields = getattr(kind, "__dataclass_fields__", {})
    for key in options:
        if key not in fields:
            known = hint(str(key), fields) if fields else "it has no options"
            raise ConfigError(f"the rule '{name}' has no option '{key}': {known}")
    check_types(kind, options, f"the rule '{name}'")
    given = dict(options)
    if "operator" in fields and "operator" in given:
        given["operator"] = make_operator(given["operator"])
    if issubclass(kind, Mixed) and "rules" in given:
        given["rules"] = _make_rules(given["rules"])
    if issubclass(kind, Flipped) and "rule" in given:
        given["rule"] = _make_part("to flip", given["rule"])
    absent = [
        f.name
        for f in fields.values()
        if f.name not in given and f.default is f.default_factory is MISSING
    ]
    if absent:
        raise ConfigError(f"the rule '{name}' needs its option '{absent[0]}'")
    return kind(**given)


def _make_rules(specs: Any) -> dict[Any, Rule]:
    """The rules of a mixture: for each pattern a name, or a mapping with `rule` and its `options`."""
    if not isinstance(specs, Mapping):
        raise ConfigError(
            f"the rules of a mixture are written as {{pattern: rule, ...}}, not as {specs!r}"
        )
    return {pattern: _make_part(f"for '{pattern}'", spec) for pattern, spec in specs.items()}


def _make_part(where: str, spec: Any) -> Rule:
    """A rule within another: a name, or a mapping with `rule` and its `options`."""
    parts: Any = {"rule": spec} if isinstance(spec, str) else spec
    if not isinstance(parts, Mapping) or "rule" not in parts or not {"rule", "options"} >= {*parts}:
        raise ConfigError(
            f"the rule {where} is {spec!r}: give a rule's name, or {{rule: dfa, options: {{...}}}}"
        )
    return make_rule(parts["rule"], dict(parts.get("options") or {}))


def make_operator(spec: Any) -> Operator:
    """The operator called by a name, or by a mapping with its `name` and its options, operators among them.

    Raises ConfigError for a name that is unknown, or an option that the operator does not have or needs.
    """
    if isinstance(spec, Operator):
        return spec
    options = dict(spec) if isinstance(spec, Mapping) else {"name": spec}
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in OPERATORS:
        known = hint(str(name), OPERATORS)
        raise ConfigError(
            f"unknown feedback operator {spec if name is None else name!r}: {known}; as a name, or as {{name: sparse, nonzeros: 1}}"
        )
    kind: Any = OPERATORS[name]
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}
    for key in options:
        if key not in fields:
            known = hint(str(key), fields) if fields else "it has no options"
            raise ConfigError(f"the operator '{name}' has no option '{key}': {known}")
    absent = [f.name for f in fields.values() if f.name not in options and f.default is MISSING]
    if absent:
        raise ConfigError(f"the operator '{name}' needs its option '{absent[0]}'")
    check_types(kind, options, f"the operator '{name}'")
    types = get_type_hints(kind)
    return kind(
        **{
            key: make_operator(given) if types[key] is Operator else given
            for key, given in options.items()
        }
    )


def find_device(name: str) -> torch.device:
    """cpu, cuda, or the best there is for auto."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device is cuda, but PyTorch sees no CUDA device: use --device cpu or auto"
        )
    chosen = "cuda" if name == "auto" and torch.cuda.is_available() else name
    return torch.device("cpu" if chosen == "auto" else chosen)


def shared_data(config: DataConfig, task: str = "classification") -> AnyData:
    """The data set, loaded once for all the runs of a comparison, and again when its files have changed."""
    return _loaded(config, task, TASKS[task].fingerprint(config))


def forget_data() -> None:
    """Let go of what `shared_data` loaded last."""
    _loaded.cache_clear()


@functools.lru_cache(maxsize=1)
def _loaded(config: DataConfig, task: str, fingerprint: str) -> AnyData:
    return TASKS[task].load(config)


def warn_of_channels_last(model: nn.Module, device: torch.device) -> None:
    """Name a convolution in which oneDNN 3.12 corrupts memory on CPUs without AVX-512."""
    for name, module in model.named_modules():
        strided = (
            isinstance(module, nn.Conv2d)
            and set(module.kernel_size) == {1}
            and max(module.stride) > 1
        )
        if device.type == "cpu" and strided and (module.in_channels % 8 or module.out_channels % 8):
            warnings.warn(
                f"{name!r} is a strided 1x1 convolution whose channels are no multiple of 8: channels-last, PyTorch can "
                "crash in it on CPUs without AVX-512. Leave channels_last off, or use multiples of 8.",
                stacklevel=3,
            )
            return


def in_channels_last(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with its convolutions in that layout, on the device that it trains on."""
    warn_of_channels_last(model, device)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def build_learner(config: TrainConfig, data: AnyData, device: torch.device) -> Learner:
    """The net with its rule attached, on the device; everything random comes from ``config.seed``."""
    seed_everything(config.seed)
    rule = make_rule(config.rule, config.rule_options)
    task = TASKS[config.task]
    shape, classes, options = data.shape, data.num_classes, config.model_options
    model = nets.build(config.model, shape, classes, config.norm, task.name, options).to(device)
    if config.dropout is not None:
        nets.set_dropout(model, config.dropout)
    if config.channels_last:
        model = in_channels_last(model, device)
    sites: Any = nets.default_sites(config.model) if config.sites is None else config.sites
    if sites == "published":
        sites = nets.published_sites(config.model)
    if len(data.train) < 2:
        raise ConfigError(f"{len(data.train)} training image gives no batch: use at least 2")
    batches = task.batches(data.train, data, min(4, len(data.train)), device=device)
    example, target = next(batches.epoch(0))
    error_at = config.error_at or nets.default_error_at(config.model)
    learner = attach(model, rule, example=example, sites=sites, error_at=error_at, seed=config.seed)
    _check_output(learner, example, task.output_shape(target, data), config)
    return learner


def _check_output(
    learner: Learner, example: Any, expected: tuple[int, ...], config: TrainConfig
) -> None:
    learner.eval()
    with torch.no_grad():
        output = run(learner, example)
    learner.train()
    if not isinstance(output, Tensor) or output.shape != expected:
        got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        given = [list(t.shape) for t in tree_leaves(example)]
        raise ConfigError(
            f"the model '{config.model}' returned {got} for inputs of shape {', '.join(map(str, given))}: expected "
            f"{list(expected)}, an output for each class of the data; a callable of your own is given them as `classes`"
        )


def import_from_here() -> None:
    """Let package.module:name find modules in the working directory, as `python -m` does."""
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
