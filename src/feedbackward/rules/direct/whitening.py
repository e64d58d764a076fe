"""Activities whose channels are made uncorrelated, for the learning of direct feedback."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from feedbackward.graph import Site
from feedbackward.operators.base import widened


def has_places(site: Site, h: Tensor) -> bool:
    """Whether the channels are seen in many places, so that a batch tells their covariance."""
    return h.dim() > 2 or site.tokens > 0


def whitened(site: Site, d: Tensor, h: Tensor, center: bool, ridge: float) -> tuple[Tensor, Tensor]:
    r"""Errors `[K, *source]` and activities `[K, *site]`, in float32 or wider, whose product is `d^T h C^-1`.

    .. math:: d^\top (h - \bar h)\, (C + \mathrm{ridge} \cdot \bar v\, I)^{-1}, \qquad
        C = \operatorname{mean}_{m,p}\, (h_{mp} - \bar h_p) (h_{mp} - \bar h_p)^\top \quad [c, c]

    over samples m and places p of a map `[c, *places]` (or tokens `[*tokens, c]`). :math:`\bar h` is the mean over samples
    (0 if not `center`) and :math:`\bar v` the mean variance of a channel.

    K is M, the samples, with `d` as it is; or the units of the source, with :math:`d^\top (h - \bar h)` in place of the
    activity and the identity in place of the error, where it is less work to whiten those.
    """
    x = widened(h if site.tokens else h.movedim(1, -1)).contiguous()
    if center:
        x = x - x.mean(0)
    d = d.to(x.dtype)
    units, channels = math.prod(d.shape[1:]), x.shape[-1]
    with torch.autocast(h.device.type, enabled=False):
        inverse = _inverse_covariance(x.reshape(-1, channels), ridge)
        if (len(d) - units) * channels > units**2:
            x = (d.reshape(-1, units).t() @ x.flatten(1)).reshape(units, *x.shape[1:])
            d = torch.eye(units, dtype=d.dtype, device=d.device).reshape(units, *d.shape[1:])
        x = x @ inverse
    return d, x if site.tokens else x.movedim(-1, 1)


def _inverse_covariance(flat: Tensor, ridge: float) -> Tensor:
    covariance = flat.t() @ flat / len(flat)
    size = covariance.diagonal().mean()
    covariance.diagonal().add_(ridge * torch.where(size > 0, size, 1.0))
    # no check of the root, for which the host would wait for the device
    root, _ = torch.linalg.cholesky_ex(covariance)
    return torch.cholesky_solve(torch.eye(len(root), dtype=root.dtype, device=root.device), root)
