"""Diversely stale parameters."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from feedbackward.activity import Site, Source
from feedbackward.errors import AttachError, FeedbackError
from feedbackward.graph import Graph
from feedbackward.rule import Rule

# who delays the gradients of a learner; an object that is gone delays nothing
DELAYED: WeakKeyDictionary[nn.Module, WeakSet[Any]] = WeakKeyDictionary()


def own_delays(rule: Rule, parts: int) -> tuple[int, ...]:
    """How many steps late the gradients of each part arrive by the rule itself; none but DSP's are late."""
    return rule.delays(parts) if isinstance(rule, DSP) else (0,) * parts


def check_delayed(learner: nn.Module, label: str) -> None:
    """A rule that is a schedule as well is plain backprop without its `Delayed`.

    Raises FeedbackError where none was made, and warns where the one that was made is gone.
    """
    if DELAYED.get(learner):
        return
    fix = (
        "make `delayed = fb.Delayed(learner)`, keep it, and call `delayed.exchange()` before every "
        "optimizer step."
    )
    if learner not in DELAYED:
        raise FeedbackError(
            f"{label} is a schedule as well, without which it would be plain backprop: {fix}"
        )
    warnings.warn(
        f"the fb.Delayed of this learner is gone, so {label} trains by plain backprop now: {fix}",
        stacklevel=4,
    )


@dataclass(frozen=True)
class DSP(Rule):
    r"""Diversely stale parameters: backprop in a pipeline of blocks, in which lower blocks have older gradients.

    .. math:: W_k^{t+1} = W_k^t - \eta\, \nabla_{W_k} \mathcal L\,(W^{t-\tau_k};\, x^{t-\tau_k}), \qquad
        \tau_k = \mathrm{spacing} \cdot (K - k)

    for blocks k = 1..K, so that three blocks are 4, 2 and 0 steps late. The gradients are backprop's, and :class:`Delayed`
    delays them.

    The parts of the network between its sites are grouped into K blocks with about the same number of parts. For other
    blocks, name the K - 1 sites between them.

    blocks: K.
    spacing: steps between two blocks. It is 2 in a pipeline whose blocks alternate forward and backward passes.

    Xu, Huo & Huang, "On the Acceleration of Deep Learning Model Parallelism with Staleness", CVPR 2020 (arXiv:1909.02625).
    In the paper's pipeline, the error that reaches a block has passed through upper blocks with the weights of later steps.
    Here each gradient belongs to one step. Nothing runs in parallel: the rule shows what late gradients do to learning.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.rules.DSP(), example=x)
        >>> delayed = fb.Delayed(learner)
        >>> delayed.delays  # in steps, the lowest part first
        (4, 2, 0)
        >>> nn.functional.cross_entropy(learner(x), y).backward()
        >>> delayed.exchange()  # before every step of the optimizer
    """

    blocks: int = 3
    spacing: int = 2

    name = "dsp"
    label = "DSP"
    paper = "Xu et al. 2020"
    unlocked = "forward"
    transport = True

    def __post_init__(self) -> None:
        if self.blocks < 1 or self.spacing < 0:
            raise AttachError(
                f"DSP needs blocks >= 1 and spacing >= 0, got {self.blocks} and {self.spacing}."
            )

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        return Graph()

    def delays(self, parts: int) -> tuple[int, ...]:
        """How many steps late the gradients of each part arrive, the lowest part first and the head last."""
        blocks = min(self.blocks, parts)
        return tuple(self.spacing * (blocks - 1 - i * blocks // parts) for i in range(parts))
