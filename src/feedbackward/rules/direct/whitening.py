"""Activities whose channels are made uncorrelated, for the learning of direct feedback."""

from __future__ import annotations

import torch
from torch import Tensor

from feedbackward.graph import Site
from feedbackward.operators.base import widened


def whitened(site: Site, h: Tensor, center: bool, ridge: float) -> Tensor:
    r"""The activity times the inverse covariance of its channels, `[M, *site]`, in float32 or wider.

    .. math:: (C + \mathrm{ridge} \cdot \bar v\, I)^{-1} (h - \bar h), \qquad
        C = \operatorname{mean}_{m,p}\, (h_{mp} - \bar h_p) (h_{mp} - \bar h_p)^\top \quad [c, c]

    over samples m and places p of a map `[c, *places]` (or tokens `[*tokens, c]`). :math:`\bar h` is the mean over samples
    (0 if not `center`) and :math:`\bar v` the mean variance of a channel. A vector comes back as it is, for a batch has too few
    samples of it.
    """
    if h.dim() == 2 and not site.tokens:
        return h
    axis = -1 if site.tokens else 1
    x = widened(h).movedim(axis, -1)
    if center:
        x = x - x.mean(0)
    channels = x.shape[-1]
    with torch.autocast(h.device.type, enabled=False):
        flat = x.reshape(-1, channels)
        covariance = flat.t() @ flat / len(flat)
        size = covariance.diagonal().mean()
        covariance.diagonal().add_(ridge * torch.where(size > 0, size, 1.0))
        # no check of the root, for which the host would wait for the device
        root, _ = torch.linalg.cholesky_ex(covariance)
        inverse = torch.cholesky_solve(torch.eye(channels, dtype=x.dtype, device=x.device), root)
        return (flat @ inverse).reshape(x.shape).movedim(-1, axis)
