"""The contract of a learning rule.

A rule is a frozen dataclass of hyper-parameters. It holds no tensors and knows no model; it says which
activities are cut, which edges carry the error to them (and with which operator), and what gradient the
feedback weights get.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor, nn

from feedbackward.errors import AttachError
from feedbackward.graph import Edge, Graph, Site, Source
from feedbackward.operators.base import Weights, within

if TYPE_CHECKING:
    from feedbackward.engine.phase import Phase


@dataclass(frozen=True)
class Properties:
    """What a rule needs and costs, for `feedbackward rules` and the docs.

    L layers, N batch, n features of all sites, C units of the source, W weights of the network, c outputs of a layer, D the
    multiplications of backprop's input gradients (saved: hence the minus), opt. the optimizer's state of the feedback.

    weight_transport: whether forward weights are used in the backward pass; in a word where it is less than that ("signs").

    Example:
        >>> import feedbackward as fb
        >>> fb.DFA.properties.backward_steps, fb.DFA.properties.weight_transport
        ('1', False)
    """

    backward_unlocked: bool
    update_unlocked: bool
    forward_unlocked: bool
    weight_transport: bool | str
    learned_feedback: bool
    backward_steps: str
    extra_memory: str
    extra_compute: str


class Rule(ABC):
    """A learning rule; subclass it as a frozen dataclass and override `graph` (and `feedback_grad`).

    Example:
        >>> from dataclasses import dataclass
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> @dataclass(frozen=True)
        ... class Halved(fb.Rule):
        ...     name, label, paper, properties = "halved", "Halved", "an example", fb.DFA.properties
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
    properties: ClassVar[Properties]
    feeds: ClassVar[type[Site]] = (
        Site  # LayerInput: the inputs of single layers instead of activities
    )
    sends_activity: ClassVar[bool] = False  # whether `message` is given the source's activity
    receives: ClassVar[bool] = (
        False  # whether `receive` makes a site's signal of what the operator sent
    )
    in_phase: ClassVar[bool] = (
        False  # whether feedback learns in `feedback_step`, instead of in every backward pass
    )
    # whether `feedback_step` adds to the gradients of the model's weights too: call it once between backward and optimizer
    revises: ClassVar[bool] = False
    needs: ClassVar[Literal["error", "target", "nothing"]] = (
        "error"  # what the signals of a pass are made from
    )
    # whether the signals and feedback gradients of a pass scale with the loss, so that a GradScaler may scale it
    linear: ClassVar[bool] = True

    @abstractmethod
    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        """The feedback graph of the rule on these sites."""

    @property
    def learned(self) -> bool:
        """Whether the feedback weights are learned (Parameters) or fixed (buffers)."""
        return self.properties.learned_feedback

    @property
    def least_batch(self) -> int:
        """The smallest batch the rule can work with."""
        return 1

    @property
    def needs_error(self) -> bool:
        """Whether some signal is made from the output or its error, so that it is known after the forward pass only."""
        return self.needs == "error" or self.sends_activity

    def delays(self, parts: int) -> tuple[int, ...]:
        """For a preset of rule and schedule: how many steps late the gradients of each part of the network arrive, the lowest
        part first and the head last. A `Delayed` then delays them."""
        return (0,) * parts

    def learns(self, edge: Edge) -> bool:
        """Whether the weights of this edge are learned; a rule that mixes others decides edge by edge."""
        return self.learned

    def learns_in_pass(self, edge: Edge) -> bool:
        """Whether the weights of this edge get their gradient from `feedback_grad`, in every backward pass."""
        return self.learns(edge) and edge.shares is None and not self.in_phase

    def message(
        self, edge: Edge, d: Tensor, target: Tensor | None, activity: Tensor | None
    ) -> Tensor:
        """What travels along an edge, `[M, *source]`: the source's error `d` unless the rule says otherwise.

        `target`: where the rule `needs` it, what `learner.target` was given, one-hot and times its scale, `[M, *source]`;
            None at a source that is a site itself.
        `activity`: where the rule `sends_activity`, the source itself, `[M, *source]`.
        """
        return d

    def receive(self, edge: Edge, sent: Tensor, h: Tensor) -> Tensor:
        """For a rule that `receives`: the signal of the edge's site, `[M, *site]`, from what the operator sent there.

        `sent`, `h: [M, *site]`: what the operator made of the message, and the site's activity.
        """
        return sent

    def feedback_grad(self, edge: Edge, weights: Weights, d: Tensor, h: Tensor) -> Weights:
        """The gradients of the edge's learnable weights, to be descended by the user's optimizer.

        `d: [M, *source]` is what travelled, `h: [M, *site]` the activity.
        """
        raise NotImplementedError(
            f"{type(self).__name__} says that it learns its feedback, but not how."
        )

    def feedback_step(self, phase: Phase) -> None:
        """For a rule that learns its feedback `in_phase`: give the edges' weights their gradients, from passes of its own."""
        raise NotImplementedError(
            f"{type(self).__name__} says that its feedback learns in a phase, but not how."
        )

    def auxiliary(self, site: Site, source: Source) -> nn.Module:
        """For a site of `Graph.local`: the network whose own loss trains the segment below the site."""
        raise NotImplementedError(
            f"{type(self).__name__} gives local losses to sites, but not the network."
        )

    def local_loss(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss of an auxiliary network's output. `target` as `learner.target` got it."""
        raise NotImplementedError(
            f"{type(self).__name__} gives local losses to sites, but not the loss."
        )


def refuse_zeros(label: str, holder: object) -> None:
    """Fixed feedback must not be zero. `holder` has the fields `init` and `scale`, where they have a meaning; so may the
    operators that it chooses from."""
    parts = list(within(holder))
    if any(
        getattr(part, "init", None) == "zeros" or getattr(part, "scale", None) == 0
        for part in parts
    ):
        raise AttachError(
            f"{label}'s feedback is fixed: zero feedback would never train a hidden layer. Use another init."
        )
