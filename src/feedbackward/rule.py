"""The contract of a learning rule.

A rule is a frozen dataclass of hyper-parameters. It holds no tensors and knows no model. It says which activities are cut,
which edges carry the error to them, through which operator, and what gradient the feedback weights get.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal, final

from torch import Tensor

from feedbackward.activity import Site, Source
from feedbackward.errors import AttachError
from feedbackward.graph import Edge, Graph
from feedbackward.operators import OPERATORS, Weights
from feedbackward.operators.base import within

if TYPE_CHECKING:
    from feedbackward.engine.phase import Phase


class Rule(ABC):
    """A learning rule; subclass it as a frozen dataclass and override `graph` (and `feedback_grad`).

    Class fields, most of which have a default:

    name, label, paper: on the command line, in tables, and where it was published.
    learned: whether the feedback weights are learned (Parameters) or fixed (buffers).
    transport: whether forward weights are used in the backward pass; in a word where it is less ("signs").
    unlocked: what need not wait for the layers above: "backward" (no signal waits for another one), "update" (nor for
        the output's error), "forward" (nor for the layers above at all); "" where signals wait for each other.
    one_rate: whether learned feedback wants the rate of the forward weights, whose gradients it gets.
    feeds: `LayerInput` where the rule feeds the inputs of single layers instead of activities; `graph.SiteInContext` where it
        asks for the layers above each activity.
    needs: what the signals of a pass are made from: the "error", a "target" (`learner.target`) or "nothing".
    linear: whether signals and feedback gradients scale with the loss, so that a GradScaler may scale it.
    sends_activity: whether `message` is given the source's activity.
    receives: whether `receive` makes a site's signal of what the operator sent.
    in_phase: whether feedback learns in `feedback_step`, instead of in every backward pass.
    revises: whether `feedback_step` adds to the gradients of the model's weights too: then it is called once between the
        backward pass and the optimizer.

    Example:
        >>> from dataclasses import dataclass
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> @dataclass(frozen=True)
        ... class Halved(fb.Rule):
        ...     name, label, paper = "halved", "Halved", "an example"
        ...     def graph(self, sites, source):
        ...         return fb.star(sites, source, fb.Dense(scale=0.5))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, Halved(), example=torch.randn(16, 4))
        >>> [tuple(B.shape) for B in learner.feedback.buffers()]
        [(3, 8)]
    """

    name: ClassVar[str]
    label: ClassVar[str]
    paper: ClassVar[str]
    learned: ClassVar[bool] = False
    one_rate: ClassVar[bool] = False
    transport: ClassVar[bool | str] = False
    unlocked: ClassVar[Literal["", "backward", "update", "forward"]] = ""
    feeds: ClassVar[type[Site]] = Site
    needs: ClassVar[Literal["error", "target", "nothing"]] = "error"
    linear: ClassVar[bool] = True
    sends_activity: ClassVar[bool] = False
    receives: ClassVar[bool] = False
    in_phase: ClassVar[bool] = False
    revises: ClassVar[bool] = False

    @abstractmethod
    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        """The feedback graph of the rule on these sites."""

    @final
    def connect(self, sites: Sequence[Site], source: Source) -> Graph:
        """The rule's graph, whose edges and local losses carry the rule."""
        rule = with_operator(self)
        return rule.graph(sites, source).of_rule(rule)

    @property
    def least_batch(self) -> int:
        """The smallest batch the rule can work with."""
        return 1

    @property
    def needs_error(self) -> bool:
        """Whether some signal needs the output or its error, and so the end of the forward pass."""
        return self.needs == "error" or self.sends_activity

    def delays(self, parts: int) -> tuple[int, ...]:
        """For one release: only :class:`DSP` has delays."""
        warnings.warn("only fb.rules.DSP has delays", DeprecationWarning, stacklevel=2)
        return (0,) * parts

    def message(
        self, edge: Edge, d: Tensor, target: Tensor | None, activity: Tensor | None
    ) -> Tensor:
        """What an edge carries, `[M, *source]`: the source's error `d`, unless the rule says otherwise.

        target: if the rule `needs` it, what `learner.target` got, one-hot and times its scale, `[M, *source]`. It is None
            at a source that is also a site.
        activity: if the rule `sends_activity`, the activity of the source, `[M, *source]`.
        """
        return d

    def receive(self, edge: Edge, sent: Tensor, h: Tensor) -> Tensor:
        """For a rule that `receives`: the signal of the edge's site, `[M, *site]`.

        sent: what the operator made of the message, `[M, *site]`.
        h: the activity of the site, `[M, *site]`.
        """
        return sent

    def feedback_grad(self, edge: Edge, weights: Weights, d: Tensor, h: Tensor) -> Weights:
        """The gradients of the edge's learnable weights, for the user's optimizer.

        d: what the edge carried, `[M, *source]`.
        h: the activity of the site, `[M, *site]`.
        """
        raise NotImplementedError(
            f"{type(self).__name__} says that it learns its feedback, but not how."
        )

    def feedback_step(self, phase: Phase) -> None:
        """For a rule that learns its feedback `in_phase`: give the edges' weights their gradients."""
        raise NotImplementedError(
            f"{type(self).__name__} says that its feedback learns in a phase, but not how."
        )


def with_operator(rule: Rule) -> Rule:
    """The rule with its operator, if that was given by its name."""
    name = getattr(rule, "operator", None)
    if not isinstance(name, str):
        return rule
    if name not in OPERATORS:
        raise AttachError(
            f"{rule.label} has no operator {name!r}: choose one of {', '.join(OPERATORS)}, or give an instance (fb.Dense())."
        )
    try:
        return replace(rule, operator=OPERATORS[name]())  # type: ignore[type-var]
    except TypeError as error:
        kind = OPERATORS[name].__name__
        raise AttachError(
            f"operator={name!r} needs options ({error}): write operator=fb.{kind}(...)."
        ) from error


def refuse_zeros(label: str, holder: object) -> None:
    """Refuse fixed feedback that is zero.

    holder: an object with the fields `init` and `scale`, or with operators that have them.
    """
    parts = list(within(holder))
    if any(
        getattr(part, "init", None) == "zeros" or getattr(part, "scale", None) == 0
        for part in parts
    ):
        raise AttachError(
            f"{label}'s feedback is fixed: zero feedback would never train a hidden layer. Use another init."
        )
