"""The contract of a learning rule.

A rule is a frozen dataclass of hyper-parameters. It holds no tensors and knows no model. It says which activities are cut,
which edges carry the error to them, through which operator, and what gradient the feedback weights get.
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

    In the texts, L counts layers, N is the batch, n the features of all sites, C the units of the source, W the weights of
    the network, c the outputs of a layer, and "opt." the optimizer's state for the feedback. D is the multiply-adds of
    backprop's input gradients, which a rule with "- D" saves.

    weight_transport: whether the backward pass uses forward weights, or a word if it uses less than that ("signs").

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
    # what the rule feeds: activities (Site), or the inputs of single layers (LayerInput)
    feeds: ClassVar[type[Site]] = Site
    # whether `message` gets the source's activity
    sends_activity: ClassVar[bool] = False
    # whether `receive` makes the signal of a site from what the operator sent
    receives: ClassVar[bool] = False
    # whether feedback learns in `feedback_step` instead of in every backward pass
    in_phase: ClassVar[bool] = False
    # whether `feedback_step` also adds to the gradients of the model's weights: call it between backward and optimizer
    revises: ClassVar[bool] = False
    # what the signals of a pass are made from
    needs: ClassVar[Literal["error", "target", "nothing"]] = "error"
    # whether signals and feedback gradients scale with the loss, so that a GradScaler may scale it
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
        """Whether some signal needs the output or its error, and so the end of the forward pass."""
        return self.needs == "error" or self.sends_activity

    def delays(self, parts: int) -> tuple[int, ...]:
        """For a rule with late gradients (DSP): the delay of each part of the network in steps, the lowest part first.

        `fb.Delayed` applies these delays.
        """
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

    def auxiliary(self, site: Site, source: Source) -> nn.Module:
        """For a site of `Graph.local`: the network whose own loss trains the segment below the site."""
        raise NotImplementedError(
            f"{type(self).__name__} gives local losses to sites, but not the network."
        )

    def local_loss(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss of an auxiliary network's output. `target` is what `learner.target` got."""
        raise NotImplementedError(
            f"{type(self).__name__} gives local losses to sites, but not the loss."
        )


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
