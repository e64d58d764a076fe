"""Direct rules with another function in place of the activation's derivative."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from feedbackward.activity import PreActivation, Site
from feedbackward.errors import AttachError
from feedbackward.graph import Edge
from feedbackward.rule import Rule

# g(a): what stands for the slope of the activation at `a`
DERIVATIVES: dict[str, Callable[[Tensor], Tensor]] = {
    "one": torch.ones_like,
    "step": lambda a: (a > 0).to(a.dtype),
    "leaky": lambda a: torch.where(a > 0, torch.ones_like(a), 0.1),
    "tanh": lambda a: 1 - a.tanh().square(),
    "sigmoid": lambda a: a.sigmoid() * (1 - a.sigmoid()),
    "cos": torch.cos,
}


class Augmented(Rule):
    r"""A direct rule that may replace the derivative of the activation functions. Abstract: DFA and DKP, which have the field.

    derivative: None for the activations' own derivatives. Otherwise the name of a function g, and

        .. math:: \delta a_l = (e\, B_l) \odot g(a_l) \qquad \text{in place of} \quad (e\, B_l) \odot f'(a_l)

        The sites are then the inputs :math:`a_l` of the activation modules, and `sites` names such modules.
    """

    derivative: str | None

    def __post_init__(self) -> None:
        if self.derivative is not None and self.derivative not in DERIVATIVES:
            raise AttachError(
                f"{self.label} has no derivative {self.derivative!r}: choose one of {', '.join(DERIVATIVES)}, or None for the "
                "activations' own."
            )

    @property
    def feeds(self) -> type[Site]:  # type: ignore[override]
        return Site if self.derivative is None else PreActivation

    @property
    def receives(self) -> bool:  # type: ignore[override]
        return self.derivative is not None

    def receive(self, edge: Edge, sent: Tensor, h: Tensor) -> Tensor:
        return sent if self.derivative is None else sent * DERIVATIVES[self.derivative](h)


def activity(edge: Edge, h: Tensor) -> Tensor:
    """The activity that the layers above a site get: of a pre-activation its function's value."""
    return edge.site.activation(h) if isinstance(edge.site, PreActivation) else h
