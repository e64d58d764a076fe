"""Strict normalisation of forward weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def renormalize_weights(
    parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer
) -> RemovableHandle:
    r"""After every step of the optimizer, each matrix or kernel among `parameters` gets back the norm that it has now.

    .. math:: W \leftarrow W\,\|W_0\|_F / \|W\|_F

    For chains whose feedback does not follow the weights' growth (FA, sign-concordant feedback; Moskovitz et al. 2019). The
    weights train: they are changed in place, so the optimizer goes on with them. Parameters of one dimension (biases, norms) are
    left alone, and weights that are zero. To resume a run, call it before the weights are loaded, or on any later ones: their norms
    are the same. Remove the returned handle to end it.

    parameters: usually `learner.model.parameters()`. optimizer: the one that updates them.
    """
    kept: list[tuple[Tensor, Tensor]] = [
        (p, p.detach().norm()) for p in parameters if p.dim() > 1 and p.requires_grad
    ]

    @torch.no_grad()
    def restore(*step: Any) -> None:
        for W, norm in kept:
            now = W.norm()
            W.mul_(torch.where(now > 0, norm / now, 1.0))

    return optimizer.register_step_post_hook(restore)
