"""What `feedbackward bench` measures: the configuration, and a case for every rule, schedule and operator of it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feedbackward.errors import AttachError, ConfigError
from feedbackward.experiment import nets
from feedbackward.experiment.benchmark.bench import Case, Trainee
from feedbackward.experiment.config.arguments import parse
from feedbackward.experiment.config.schema import RuleEntry
from feedbackward.experiment.training.building import (
    find_rule,
    import_from_here,
    in_channels_last,
    make_operator,
    make_rule,
)
from feedbackward.experiment.training.checkpointed import add_checkpoints, groupings
from feedbackward.experiment.training.randomness import seed_everything
from feedbackward.learner import Learner, attach
from feedbackward.operators import OPERATORS
from feedbackward.schedules.delayed import Delayed

PLOTS = (".png", ".svg", ".pdf")
LEARNING_RATE = 1e-3  # small: on random images a larger one may diverge, and a step's cost does not depend on it


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Training steps of rules, schedules and operators beside backprop's, plain and with activation checkpointing.

    Attributes:
        models: nets, or package.module:callable; also as arguments without a flag.
        rules: names, or entries with rule, label, options.
        schedules: joint, replay, replay-keep (with keep_inputs=True), eager.
        operators: forms of the feedback, for the rules that have a choice; by default each rule's own.
        sites: layers, blocks, published, a list of module names; by default the net's own choice.
        norm: batch norm in the named nets.
        classes: outputs of the net.
        channels: of an image.
        size: height and width of an image.
        batch: images per step.
        rounds: in each, every configuration takes one step.
        threads: CPU threads; by default PyTorch's choice.
        precision: bf16 uses autocast.
        channels_last: memory format of images and convolutions.
        compile: compile with torch.compile; joint schedules only.
        device: auto takes a CUDA device where there is one.
        json: file for all numbers, hardware and versions.
        plot: file for a figure, .png, .svg or .pdf.
    """

    models: list[str] = field(default_factory=lambda: ["vgg16"])
    rules: list[str | RuleEntry] = field(default_factory=lambda: ["dfa", "dkp"])
    schedules: list[Literal["joint", "replay", "replay-keep", "eager"]] = field(
        default_factory=lambda: ["joint"]
    )
    operators: list[str | dict[str, Any]] = field(default_factory=list)
    sites: str | list[str] | None = None
    norm: bool = True
    classes: int = 10
    channels: int = 3
    size: int = 32
    batch: int = 64
    rounds: int = 11
    threads: int | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = False
    compile: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    json: str | None = None
    plot: str | None = None

    def resolved(self) -> BenchConfig:
        """The same with the entries written out.

        Raises ConfigError for an unknown name, an option that does not exist, or a value out of range.
        """
        import_from_here()
        for name, least in {
            "rounds": 1,
            "batch": 1,
            "size": 1,
            "channels": 1,
            "threads": 1,
        }.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}: it must be at least {least}")
        for what in ("models", "schedules"):
            given = getattr(self, what)
            if not given or len(set(given)) < len(given):
                raise ConfigError(f"{what} must name at least one, and none twice: got {given}")
        for model in self.models:
            nets.default_sites(model)
        if self.plot and Path(self.plot).suffix not in PLOTS:
            raise ConfigError(f"plot is '{self.plot}': it must end with {', '.join(PLOTS)}")
        entries = [RuleEntry(rule=r) if isinstance(r, str) else r for r in self.rules]
        for entry in entries:
            _check_options(entry)
        for spec in self.operators:
            make_operator(spec)
        return replace(self, rules=[entry for entry in entries if entry.rule != "bp"])


def parse_bench(arguments: Sequence[str]) -> BenchConfig:
    """The configuration that the command line describes: models first, then flags."""
    models = list(itertools.takewhile(lambda a: not a.startswith("-"), arguments))
    flags = list(arguments[len(models) :])
    if models:
        flags.append(f"--models=[{','.join(models)}]")
    about = "Step time, throughput and memory of rules, schedules and operators, beside backprop's."
    return parse(BenchConfig, flags, "feedbackward bench [MODEL ...]", about).resolved()


def make_cases(config: BenchConfig, model: str, device: torch.device) -> list[Case]:
    """Backprop, backprop with checkpoints, and all that the configuration asks for."""
    factory = Factory(config, model, device)
    cases = [
        Case("bp", "joint", "-", factory.backprop),
        Case("bp, checkpointed", "joint", "-", factory.checkpointed),
    ]
    for entry in config.rules:
        assert isinstance(entry, RuleEntry)
        choice = "operator" in _fields(entry) and "operator" not in entry.options
        for spec in config.operators if choice and config.operators else [None]:
            for schedule in config.schedules:
                build = factory.learner(entry, schedule, spec)
                cases.append(Case(_label(entry), schedule, _operator_text(entry, spec), build))
    return cases


class Factory:
    """Makes the networks of one bench: all from the same seed, on the same batch."""

    def __init__(self, config: BenchConfig, model: str, device: torch.device) -> None:
        self.config, self.model, self.device = config, model, device
        self.shape = (config.channels, config.size, config.size)
        self._group: int | None = None
        seed_everything(0)
        self.x = torch.randn(config.batch, *self.shape, device=device)
        self.y = torch.randint(config.classes, (config.batch,), device=device)
        if config.channels_last:
            self.x = self.x.to(memory_format=torch.channels_last)

    def net(self) -> nn.Module:
        """A fresh network, in training mode."""
        seed_everything(0)
        model = nets.build(self.model, self.shape, self.config.classes, norm=self.config.norm)
        model = model.to(self.device)
        if self.config.channels_last:
            model = in_channels_last(model, self.device)
        return model.train()

    def backprop(self) -> Trainee:
        """The plain network."""
        return self.trainee(self.net())

    def checkpointed(self) -> Trainee:
        """Backprop that keeps the inputs of some parts of the network and computes the rest again.

        A fair opponent of replay: of parts of 1, 2, 4, ... blocks those are taken that need the least memory.
        """
        if self._group is None:
            self._group = self._best_group()
        model = self.net()
        parts = add_checkpoints(model, self._group)
        blocks = "1 block" if self._group == 1 else f"up to {self._group} blocks"
        return replace(
            self.trainee(model), note=f"{parts} parts of {blocks}, the least memory of those tried"
        )

    def _best_group(self) -> int:
        sizes = {}
        for group in groupings(self.net()):
            model = self.net()
            add_checkpoints(model, group)
            trainee = self.trainee(model, compiled=False)
            trainee.step()
            sizes[group] = trainee.activation_bytes(self.device) or 0
        return min(sizes, key=lambda group: sizes[group])

    def learner(self, entry: RuleEntry, schedule: str, spec: Any) -> Callable[[], Trainee]:
        """How to make the network that a rule trains by a schedule, with this operator."""

        def build() -> Trainee:
            if self.config.compile and schedule != "joint":
                raise AttachError(
                    f'schedule="{schedule}" runs one segment after the other, which torch.compile would take apart: '
                    "leave out --compile."
                )
            options = entry.options if spec is None else {**entry.options, "operator": spec}
            rule = make_rule(entry.rule, options)
            sites: Any = (
                nets.default_sites(self.model) if self.config.sites is None else self.config.sites
            )
            if sites == "published":
                sites = nets.published_sites(self.model)
            few = self.x[: max(2, rule.least_batch)]
            learner = attach(self.net(), rule, example=few, sites=sites).train()
            return self.trainee(learner, schedule)

        return build

    def trainee(self, net: nn.Module, schedule: str = "joint", compiled: bool = True) -> Trainee:
        """A step of this network, or learner, and of its optimizer."""
        compiled = compiled and self.config.compile
        way, _, keep = schedule.partition("-")
        optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE, momentum=0.9)
        forward: Any = torch.compile(net) if compiled else net
        learner = net if isinstance(net, Learner) else None
        delays = learner.rule.delays(len(learner.plan.stages)) if learner is not None else ()
        stale = Delayed(learner, delays) if learner is not None and any(delays) else None

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            if learner is not None and learner.rule.needs == "target":
                learner.target(self.y)
            if learner is None or schedule == "joint":
                with self.precision():
                    loss = self.loss(forward(self.x))
                loss.backward()
            else:
                with self.precision():
                    learner.backward(self.x, self.loss, way, keep_inputs=bool(keep))  # type: ignore[arg-type]
            if learner is not None and learner.rule.in_phase:
                with self.precision():
                    learner.feedback_step(self.x, self.loss)
            if stale is not None:
                stale.exchange()
            optimizer.step()

        for _ in range(
            max(delays, default=0)
        ):  # until all gradients have arrived, and the optimizer's state is there
            step()
        feedback = learner.feedback_bytes if learner is not None else 0
        return Trainee(step, net, optimizer, (self.x, self.y), feedback, seen=not compiled)

    def loss(self, output: Tensor) -> Tensor:
        """Mean cross entropy of the batch."""
        return F.cross_entropy(output.float(), self.y)

    @contextlib.contextmanager
    def precision(self) -> Iterator[None]:
        """Autocast, where the configuration asks for it."""
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"
        ):
            yield


def _fields(entry: RuleEntry) -> Any:
    return getattr(find_rule(entry.rule), "__dataclass_fields__", {})


def _check_options(entry: RuleEntry) -> None:
    """Raise ConfigError for what no net could take; what a rule refuses is found when it is built."""
    with contextlib.suppress(AttachError):
        make_rule(entry.rule, entry.options)


def _label(entry: RuleEntry) -> str:
    options = [f"{key}={value}" for key, value in entry.options.items()]
    return entry.label or " ".join([entry.rule, *options])


def _operator_text(entry: RuleEntry, spec: Any) -> str:
    """The operator's name and options, as they were given; the rule's own one by its name."""
    if isinstance(spec, str):
        return spec
    if spec is not None:
        return " ".join([spec["name"], *(f"{k}={v}" for k, v in spec.items() if k != "name")])
    own = getattr(_fields(entry).get("operator"), "default", None)
    names = [name for name, kind in OPERATORS.items() if type(own) is kind]
    return names[0] if names and "operator" not in entry.options else "-"
