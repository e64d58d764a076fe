"""The typed configuration of a training run and of a comparison.

A field that is None means "as the recipe says"; `TrainConfig.resolved` fills all of them in, and that is what
a run saves.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from feedbackward.errors import ConfigError
from feedbackward.experiment.config.recipes import Optimizer, Rates, Recipe, check, find_recipe
from feedbackward.experiment.data.dataset import DataConfig
from feedbackward.rules import RULES


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What to change in a recipe's optimizer.

    Attributes:
        name: the optimizer.
        lr: learning rate, the peak of it where the schedule varies it.
        momentum: of sgd.
        nesterov: Nesterov's momentum, of sgd.
        weight_decay: L2 in sgd and adam, decoupled in adamw.
        schedule: of the rate over the run.
        gamma: factor per epoch of the step schedule.
        clip: largest norm of the gradient; 0 does not clip.
        renormalize_weights: after every update give each matrix or kernel its initial norm back (strict normalisation).
    """

    name: Literal["sgd", "adam", "adamw"] | None = None
    lr: float | None = None
    momentum: float | None = None
    nesterov: bool | None = None
    weight_decay: float | None = None
    schedule: Literal["constant", "one-cycle", "cosine", "step"] | None = None
    gamma: float | None = None
    clip: float | None = None
    renormalize_weights: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a training run and a comparison have in common.

    Attributes:
        model: small_cnn, alexnet, vgg6, vgg11, vgg13, vgg16, resnet18, resnet20, resnet56, resnet110, mlp, or package.module:callable.
        norm: batch norm in the named nets.
        dropout: probability of the net's dropout layers, which are put after its hidden linear layers where it has none; by default
            the net's own.
        sites: layers, every-2 (or 3, ...), stages, blocks, published, a list of module names; by default the net's own choice.
        error_at: module whose output's error is broadcast; by default the model's output.
        data: which images.
        recipe: default or published; the fields below change it.
        epochs: passes over the training images.
        batch_size: images per step.
        forward: changes to the recipe's optimizer of the network's weights.
        feedback: changes to the recipe's optimizer of learned feedback weights.
        schedule: joint; replay keeps one segment's activities in memory, eager too, for rules that need no error.
        staleness: steps by which all gradients arrive late, on top of what the rule says (dsp).
        backward_steps: products in sequence that an update waits for; parts whose signal takes more get it late, as in a pipeline; 0
            waits for all.
        predict_weights: take gradients that will be late at the weights that will then be there, as far as the last step's
            movement tells; nothing else changes.
        calibrate_every: steps from one training step by exact backprop, weight transport and all, to the next; 0 never.
        feedback_every: steps from one phase in which feedback learns by itself (weight mirror, FDFA, decoders) to the next.
        freeze_feedback_after: epochs after which learned feedback (and auxiliary networks) stays as it is; by default never.
        device: auto takes a CUDA device where there is one.
        precision: bf16 and fp16 use autocast, fp16 with a loss scale.
        compile: compile the learner with torch.compile.
        channels_last: memory format of images and convolutions.
        threads: CPU threads; by default PyTorch's choice.
        probe_every: measure the alignment with backprop before training and every so many epochs; 0 never.
        probe_images: held-out images of the probe's fixed batch.
        probe_jacobian: rows of each B that the probe compares with the batch-mean Jacobian, a backward pass each; 0 none. By
            default all, where feedback is learned and there are at most 256.
        tensorboard: write scalars for TensorBoard.
        out: the folder of results.
        overwrite: replace earlier results in that folder.
    """

    model: str = "vgg6"
    norm: bool = True
    dropout: float | None = None
    sites: str | list[str] | None = None
    error_at: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    recipe: str = "default"
    epochs: int | None = None
    batch_size: int | None = None
    forward: Changes = field(default_factory=Changes)
    feedback: Changes = field(default_factory=Changes)
    schedule: Literal["joint", "replay", "eager"] = "joint"
    staleness: int = 0
    backward_steps: int = 0
    predict_weights: bool = False
    calibrate_every: int = 0
    feedback_every: int = 1
    freeze_feedback_after: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    channels_last: bool = False
    threads: int | None = None
    probe_every: int = 0
    probe_images: int = 200
    probe_jacobian: int | None = None
    tensorboard: bool = True
    out: str | None = None
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """One training run.

    Attributes:
        rule: a rule's name, or package.module:Class.
        rule_options: the rule's own options.
        seed: of initial weights, feedback, order of images, augmentation and dropout.
        resume: continue the run in its folder.
    """

    rule: str = "dkp"
    rule_options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    resume: bool = False

    def training(self) -> Recipe:
        """The complete recipe: the named one, its rates for this rule, then this config's changes."""
        base = find_recipe(self.recipe)
        rates = base.rates.get(self.rule, Rates())
        forward = _changed(base.forward, rates.lr, self.forward)
        return replace(
            base,
            epochs=self.epochs if self.epochs is not None else base.epochs,
            batch_size=self.batch_size if self.batch_size is not None else base.batch_size,
            forward=forward,
            feedback=_changed(base.feedback or forward, rates.feedback_lr, self.feedback),
            rates={},
        )

    def resolved(self) -> TrainConfig:
        """The same run with nothing left to the recipe.

        Raises:
            ConfigError: a value is out of range, or the recipe is unknown.
        """
        recipe = self.training()
        assert recipe.feedback is not None  # `training` always fills it
        check(recipe.forward, "forward")
        check(recipe.feedback, "feedback")
        config = replace(
            self,
            epochs=recipe.epochs,
            batch_size=recipe.batch_size,
            forward=Changes(**dataclasses.asdict(recipe.forward)),
            feedback=Changes(**dataclasses.asdict(recipe.feedback)),
            out=self.out
            or f"runs/{slug(self.model)}-{slug(self.data.name)}-{slug(self.rule)}-s{self.seed}",
        )
        _check_ranges(config)
        return config


CONDITIONS = ("backward_steps", "predict_weights", "calibrate_every", "freeze_feedback_after")


@dataclass(frozen=True, kw_only=True)
class RuleEntry:
    """A rule of a comparison.

    Attributes:
        rule: its name, or package.module:Class.
        label: how tables call it; by default the rule's own label and its options.
        options: the rule's own options.
        lr: rate of W, in place of the recipe's.
        feedback_lr: rate of B, in place of the recipe's.
        backward_steps, predict_weights, calibrate_every, freeze_feedback_after: of this rule, in place of the comparison's.
    """

    rule: str
    label: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    lr: float | None = None
    feedback_lr: float | None = None
    backward_steps: int | None = None
    predict_weights: bool | None = None
    calibrate_every: int | None = None
    freeze_feedback_after: int | None = None

    def conditions(self) -> dict[str, int]:
        """What is different in this rule's training loop."""
        given = {name: getattr(self, name) for name in CONDITIONS}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Search:
    """The search of rates before a comparison: one grid, equal trials per rule, held-out accuracy decides.

    Attributes:
        run: whether to search.
        lr: rates of W to try.
        feedback_lr: rates of B to try with each; a rule that learns no B tries as many more rates of W.
        epochs: per trial.
        seed: of the trials.
        baseline_only: search for backprop alone (for the first rule, where it is not among them), at these rates of W; the
            others take the one that suits it best. A B without a rate of its own (KP, Relayed KP) follows W, others keep theirs.
    """

    run: bool = False
    lr: list[float] = field(default_factory=lambda: [0.005, 0.02, 0.08])
    feedback_lr: list[float] = field(default_factory=lambda: [0.002, 0.02])
    epochs: int = 3
    seed: int = 1000
    baseline_only: bool = False


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Settings):
    """Several rules under one recipe, over several seeds.

    Attributes:
        title: of the report.
        rules: names, entries (rule, label, options, lr, ...), or `all` for every rule there is.
        seeds: one run per rule and seed.
        search: pick each rule's rates first.
        timing_steps: steps measured per rule, interleaved, for the time per step; 0 skips it.
    """

    title: str | None = None
    rules: list[str | RuleEntry] = field(default_factory=lambda: ["bp", "dfa", "dkp", "frozen"])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    search: Search = field(default_factory=Search)
    timing_steps: int = 15
    probe_every: int = 1

    def entries(self) -> list[RuleEntry]:
        """The rules, written out."""
        named = itertools.chain(*(RULES if r == "all" else [r] for r in self.rules))
        return [RuleEntry(rule=r) if isinstance(r, str) else r for r in named]

    def cell(self, entry: RuleEntry, seed: int) -> TrainConfig:
        """The run of one rule and seed; its `out` is left open."""
        shared = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(Settings) if f.name != "out"
        }
        config = TrainConfig(
            **shared | entry.conditions(), rule=entry.rule, rule_options=entry.options, seed=seed
        )
        if entry.lr is not None:
            config = replace(config, forward=replace(config.forward, lr=entry.lr))
        if entry.feedback_lr is not None:
            config = replace(config, feedback=replace(config.feedback, lr=entry.feedback_lr))
        return config

    def resolved(self) -> CompareConfig:
        """The same with the folder and the entries written out.

        Raises:
            ConfigError: no or repeated rules or seeds, or a value out of range.
        """
        entries = self.entries()
        for what, given in (("rules", [repr(e) for e in entries]), ("seeds", self.seeds)):
            if not given or len(set(given)) < len(given):
                raise ConfigError(
                    f"{what} must name at least one, and none twice: got {getattr(self, what)}"
                )
        if self.search.run and not (
            self.search.lr and self.search.feedback_lr and self.search.epochs > 0
        ):
            raise ConfigError("search needs at least one lr, one feedback_lr and one epoch")
        for entry in entries:
            self.cell(entry, self.seeds[0]).resolved()
        name = f"runs/compare-{slug(self.model)}-{slug(self.data.name)}-{slug(self.recipe)}"
        return replace(self, rules=list(entries), out=self.out or name)


def slug(text: str) -> str:
    """``text`` as part of a file name."""
    return re.sub(r"[^\w.]+", "-", text).strip("-.").lower() or "unnamed"


def _changed(base: Optimizer, lr: float | None, changes: Changes) -> Optimizer:
    given = {k: v for k, v in dataclasses.asdict(changes).items() if v is not None}
    return replace(base, **({} if lr is None else {"lr": lr}) | given)


def _check_ranges(config: TrainConfig) -> None:
    least = {
        "epochs": 1,
        "batch_size": 1,
        "threads": 1,
        "probe_every": 0,
        "probe_images": 1,
        "probe_jacobian": 0,
        "seed": 0,
        "staleness": 0,
        "backward_steps": 0,
        "calibrate_every": 0,
        "feedback_every": 1,
        "freeze_feedback_after": 0,
    }
    for name, smallest in least.items():
        value = getattr(config, name)
        if value is not None and value < smallest:
            raise ConfigError(f"{name} is {value}: it must be at least {smallest}")
    if config.dropout is not None and not 0 <= config.dropout < 1:
        raise ConfigError(
            f"dropout is {config.dropout}: it is a probability, at least 0 and below 1"
        )
    for name in ("forward", "feedback"):
        lr = getattr(config, name).lr
        if not math.isfinite(lr):
            raise ConfigError(f"{name}.lr is {lr}: it must be a finite number")
