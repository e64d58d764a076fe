"""Training recipes: everything that the rules of a comparison share, and the rates that they may not.

A recipe fixes the batch, the epochs and the optimizers of the forward weights W and of learned feedback B. A
rule may override the two rates only, so that a comparison stays one recipe.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from feedbackward.errors import ConfigError
from feedbackward.experiment.config.suggest import choose, hint


@dataclass(frozen=True)
class Optimizer:
    """How one set of weights is updated.

    Attributes:
        name: sgd, adam, adamw, muon, or package.module:Class.
        lr: the learning rate; the peak of it where the schedule varies it.
        momentum: of sgd and muon; adam and adamw have their usual betas.
        nesterov: of sgd and muon.
        weight_decay: added to the gradient as L2 by sgd and adam, decoupled by adamw and muon.
        schedule: of the rate: constant, one-cycle, cosine (to zero) or step (times gamma after every epoch).
        gamma: factor of the step schedule.
        clip: largest norm of the gradient of all these weights together; 0 does not clip.
        renormalize_weights: after every update each matrix or kernel gets its initial norm back (strict normalisation).
    """

    name: str = "sgd"
    lr: float = 0.02
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    schedule: str = "one-cycle"
    gamma: float = 1.0
    clip: float = 0.0
    renormalize_weights: bool = False


OPTIMIZERS = ("sgd", "adam", "adamw", "muon")


@dataclass(frozen=True)
class Rates:
    """The rates of W and of B; None is the recipe's own, and for B then W's."""

    lr: float | None = None
    feedback_lr: float | None = None


@dataclass(frozen=True)
class Recipe:
    """Batch size (images), epochs, and the optimizers of W and of B.

    Attributes:
        about: one line, for the docs.
        feedback: None means that B is updated exactly as W is.
        rates: per rule name, where they differ from the recipe's own.
    """

    about: str
    batch_size: int
    epochs: int
    forward: Optimizer
    feedback: Optimizer | None = None
    rates: Mapping[str, Rates] = field(default_factory=dict)


RECIPES: dict[str, Recipe] = {
    "default": Recipe(
        about="SGD with Nesterov momentum and a one-cycle rate for W and B; rates picked on held-out images",
        batch_size=100,
        epochs=10,
        forward=Optimizer(),
        rates={  # as configs/embedded.yaml picked them, with equal trials for every rule
            "bp": Rates(0.025),
            "relayed_kp": Rates(0.025),  # backprop's, for W and B
            "dkp": Rates(0.05, 0.05),  # one rate for W and B: bench/results/embedded-one-rate
            "dfa": Rates(0.006),
            "frozen": Rates(0.2),
        },
    ),
    "language_model": Recipe(
        about="AdamW with a one-cycle rate and clipped gradients for W and B; what a language model has by default",
        batch_size=16,
        epochs=1,
        forward=Optimizer(
            name="adamw", lr=1e-3, momentum=0.0, nesterov=False, weight_decay=0.01, clip=1.0
        ),
    ),
    "node_classification": Recipe(
        about="AdamW with a constant rate for W and B, every step over the whole graph",
        # of nodes with a loss: more than a graph has
        batch_size=1_000_000,
        epochs=200,
        forward=Optimizer(
            name="adamw",
            lr=0.01,
            momentum=0.0,
            nesterov=False,
            weight_decay=2.0,
            schedule="constant",
        ),
    ),
    "music": Recipe(
        about="Adam with a one-cycle rate and clipped gradients for W and B; what music has by default",
        batch_size=8,
        epochs=30,
        forward=Optimizer(
            name="adam", lr=3e-3, momentum=0.0, nesterov=False, weight_decay=0.0, clip=1.0
        ),
    ),
    "regression": Recipe(
        about="Adam with a one-cycle rate for W and B; what a regression has by default",
        batch_size=256,
        epochs=100,
        forward=Optimizer(name="adam", lr=3e-3, momentum=0.0, nesterov=False, weight_decay=0.0),
    ),
    "sentences": Recipe(
        about="Adam with a one-cycle rate and clipped gradients for W and B; what sentences have by default",
        batch_size=64,
        epochs=5,
        forward=Optimizer(
            name="adam", lr=2e-3, momentum=0.0, nesterov=False, weight_decay=0.0, clip=1.0
        ),
    ),
    "recommendation": Recipe(
        about="Adam with a one-cycle rate for W and B; what a recommendation has by default",
        batch_size=256,
        epochs=8,
        forward=Optimizer(name="adam", lr=2e-3, momentum=0.0, nesterov=False, weight_decay=1e-6),
    ),
    "published": Recipe(
        about="the DKP authors' CIFAR-10 recipe: small constant rate for W, Adam with a decaying rate for B",
        batch_size=50,
        epochs=50,
        forward=Optimizer(lr=5e-4, weight_decay=1e-6, schedule="constant"),
        feedback=Optimizer(
            name="adam",
            lr=1e-4,
            momentum=0.0,
            nesterov=False,
            weight_decay=1e-6,
            schedule="step",
            gamma=0.8,
        ),
    ),
}


def find_recipe(name: str) -> Recipe:
    """The named recipe. Raises ConfigError, with the nearest names, where there is none."""
    return choose("recipe", name, RECIPES)


def check(optimizer: Optimizer, where: str) -> None:
    """Refuse values out of range, and an unknown optimizer. Raises ConfigError naming ``where.field``."""
    if ":" not in optimizer.name and optimizer.name not in OPTIMIZERS:
        known = hint(optimizer.name, OPTIMIZERS)
        raise ConfigError(f"{where}.name is '{optimizer.name}': {known} (or package.module:Class)")
    if not optimizer.lr > 0:
        raise ConfigError(f"{where}.lr is {optimizer.lr}: a learning rate must be above 0")
    for name in ("momentum", "weight_decay", "clip", "gamma"):
        value = getattr(optimizer, name)
        if not 0 <= value < math.inf:
            raise ConfigError(f"{where}.{name} is {value}: it must be a finite number, 0 or more")
    if optimizer.name == "sgd" and optimizer.nesterov and optimizer.momentum == 0:
        raise ConfigError(
            f"{where}.nesterov needs {where}.momentum above 0: set one or switch off the other"
        )
