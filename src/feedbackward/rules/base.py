"""The contract of a learning rule.

A rule is a frozen dataclass of hyper-parameters. It holds no tensors and knows no model; it says which
activities are cut, which edges carry the error to them (and with which operator), and what gradient the
feedback weights get.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..graph import Edge, Graph, Site, Source


@dataclass(frozen=True)
class Properties:
    """What a rule needs and costs, for `feedbackward rules` and the docs.

    L layers, N batch, n features of all sites, C units of the source, W weights of the network, D the multiplications of
    backprop's input gradients (saved: hence the minus), opt. the optimizer's state of the feedback.
    """

    backward_unlocked: bool
    update_unlocked: bool
    forward_unlocked: bool
    weight_transport: bool
    learned_feedback: bool
    backward_steps: str
    extra_memory: str
    extra_compute: str


class Rule(ABC):
    """A learning rule; subclass it as a frozen dataclass and override `graph` (and `feedback_grad`)."""

    name: ClassVar[str]
    label: ClassVar[str]
    paper: ClassVar[str]
    properties: ClassVar[Properties]
    feeds: ClassVar[type[Site]] = Site  # Arc: the inputs of single layers instead of activities

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

    def feedback_grad(self, edge: Edge, B: Tensor, d: Tensor, h: Tensor) -> Tensor:
        """The gradient of `B`, to be descended by the user's optimizer. `d: [M, *source]`, `h: [M, *site]`."""
        raise NotImplementedError(f"{type(self).__name__} says that it learns its feedback, but not how.")
