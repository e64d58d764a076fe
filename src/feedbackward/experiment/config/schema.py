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
from feedbackward.experiment.config.data import DataConfig
from feedbackward.experiment.config.parallel import Parallel
from feedbackward.experiment.config.recipes import Optimizer, Rates, Recipe, check, find_recipe
from feedbackward.experiment.config.search import Search
from feedbackward.experiment.config.tasks import KINDS


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What to change in a recipe's optimizer. None keeps the recipe's value.

    Attributes:
        name: the optimizer: sgd, adam, adamw, muon, or another as package.module:Class, which is given those of lr, momentum,
            nesterov and weight_decay that it takes.
        lr: the learning rate; its peak if the schedule varies it.
        momentum: momentum of SGD and Muon.
        nesterov: use Nesterov momentum in SGD and Muon.
        weight_decay: weight decay; an L2 term in SGD and Adam, decoupled in AdamW and Muon.
        schedule: how the rate changes over the run.
        gamma: factor of the rate after every epoch, for the step schedule.
        clip: clip the gradient to this norm; 0 does not clip.
        renormalize_weights: after every update, give each matrix or kernel its initial norm back.
    """

    name: str | None = None
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
        task: what is learned: classes of images, (language_model) the next character of a text, classes of the nodes of a
            graph, (music) the next frame of a piano roll, (regression) the colours of a picture's pixels, classes of
            sentences, or (recommendation) whether what is shown is clicked.
        model: the network: small_cnn, alexnet, vgg6, vgg11, vgg13, vgg16, resnet18, resnet20, resnet56,
            resnet110, mlp, rows_gru, rows_lstm; for a language model transformer_small, transformer4, transformer6,
            transformer6_stages3, gru, lstm; for nodes gcn, gcn4, gat, sage, gin; for music music_rnn, music_gru, music_lstm (recurrent
            ones also with _steps); for regression field; for sentences sentence_gru, sentence_transformer; for recommendation
            deepfm; timm:resnet18 or any other of timm; hf:vit or any other of transformers, by its type, folder or repository; or
            your own as package.module:callable or path/to/file.py:callable.
        model_options: an option of a net of your own, of timm or of transformers, as in --model-options.depth 4.
        norm: use batch norm in the named networks.
        dropout: probability of the network's dropout layers. A network without any gets them after its
            hidden linear layers.
        sites: where the error arrives: layers, every-2 (or 3, ...), stages, blocks, published, or a list
            of module names; by default the network's own choice.
        error_at: the module whose output's error is sent; by default the network's own choice, for most its output.
        data: short for --data.name.
        recipe: the training recipe: default or published. Other flags change it.
        epochs: passes over the training images.
        batch_size: images per step.
        forward: changes to the optimizer of the network's weights.
        feedback: changes to the optimizer of learned feedback weights.
        schedule: when each segment's backward runs. replay keeps one segment's activities in memory;
            eager does too, for rules that need no error.
        staleness: delay all gradients by this many steps, in addition to the rule's own delay.
        backward_steps: products in sequence that an update waits for. Signals that take more arrive late,
            as in a pipeline; 0 waits for all.
        predict_weights: take late gradients at extrapolated weights.
        calibrate_every: make every n-th step a step of exact backprop; 0 never does.
        feedback_every: steps between two phases in which feedback learns by itself (weight mirror, FDFA,
            decoders).
        freeze_feedback_after: stop learning feedback after this many epochs; by default never.
        device: where to train; auto takes a CUDA device if there is one.
        precision: bf16 and fp16 use autocast, fp16 also a loss scale.
        compile: compile the network with torch.compile.
        channels_last: use the channels-last memory format for images and convolutions.
        threads: CPU threads; by default PyTorch's choice.
        probe_every: compare the signals with backprop's before training and after every n epochs; 0 never
            does.
        probe_images: held-out images in the probe's batch.
        probe_jacobian: rows of each B that the probe compares with the mean Jacobian, one backward pass
            each. By default all, if feedback is learned and there are at most 256.
        tensorboard: write scalars for TensorBoard.
        logger: where else the metrics go: wandb, mlflow, or your own as package.module:Class.
        parallel: division over several processes: those that torchrun started for `train`, or that `compare` starts.
        out: folder of the results; by default below runs/.
        overwrite: replace earlier results in that folder.
    """

    task: Literal[
        "classification",
        "language_model",
        "node_classification",
        "music",
        "regression",
        "sentences",
        "recommendation",
    ] = "classification"
    model: str = "vgg6"
    model_options: dict[str, Any] = field(default_factory=dict)
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
    logger: str | None = None
    parallel: Parallel = field(default_factory=Parallel)
    out: str | None = None
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """One training run.

    Attributes:
        rule: the learning rule, or your own as package.module:Class. `feedbackward rules` lists them.
        rule_options: an option of the rule, as in --rule-options.center true.
        seed: seed of initial weights, feedback, order of images, augmentation and dropout.
        resume: continue the run in its folder.
    """

    rule: str = "dkp"
    rule_options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    resume: bool = False

    def training(self) -> Recipe:
        """The complete recipe: the named one, its rates for this rule, then this config's changes."""
        named = KINDS[self.task].recipe if self.recipe == "default" else self.recipe
        base = find_recipe(named)
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
class CompareConfig(Settings):
    """Several rules under one recipe, over several seeds.

    Attributes:
        title: title of the report.
        rules: names, entries (rule, label, options, lr, ...), or `all` for every rule.
        seeds: seeds; there is one run per rule and seed.
        search: short for --search.run.
        timing_steps: steps to measure per rule for the time per step; 0 measures none.
    """

    title: str | None = None
    rules: list[str | RuleEntry] = field(default_factory=lambda: ["bp", "dfa", "dkp", "frozen"])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    search: Search = field(default_factory=Search)
    timing_steps: int = 15
    probe_every: int = 1

    def entries(self) -> list[RuleEntry]:
        """The rules, written out."""
        from feedbackward.rules import RULES  # imports PyTorch, which `--help` need not wait for

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
        self.search.check()
        for entry in entries:
            self.cell(entry, self.seeds[0]).resolved()
        name = f"runs/compare-{slug(self.model)}-{slug(self.data.name)}-{slug(self.recipe)}"
        return replace(self, rules=list(entries), out=self.out or name)


@dataclass(frozen=True, kw_only=True)
class Only:
    """The part of a grid to run; the rest keeps its results. None is everything.

    Attributes:
        sections: run these sections only.
        models: run these networks only.
        data: run these data sets only.
        rules: run these rules or labels only.
        seeds: run these seeds only.
    """

    sections: list[str] | None = None
    models: list[str] | None = None
    data: list[str] | None = None
    rules: list[str] | None = None
    seeds: list[int] | None = None


@dataclass(frozen=True, kw_only=True)
class CompareCommand(CompareConfig):
    """A comparison, or a grid of them, as the command line describes it.

    Attributes:
        only: the part to run.
        scale: share of the training images, such as 0.05. Below 1, a grid's `scaled` settings apply.
        workers: runs at once, each in a process and on a thread of its own; by default one per core, as
            far as memory allows, and one on a GPU.
        executor: what runs them: processes of this machine (local), or tasks of Ray (extra `ray`), here or on a cluster whose
            nodes see the folder of the results; there, --workers is by default what its CPUs allow.
        dry_run: show what would be run, and run nothing.
        report_only: write the report of what is there, and run nothing.
    """

    only: Only = field(default_factory=Only)
    scale: float = 1.0
    workers: int | None = None
    executor: Literal["local", "ray"] = "local"
    dry_run: bool = False
    report_only: bool = False

    def comparison(self) -> CompareConfig:
        """What is compared, without how it is run."""
        names = [f.name for f in dataclasses.fields(CompareConfig)]
        return CompareConfig(**{name: getattr(self, name) for name in names})


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
