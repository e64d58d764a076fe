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
    seen = x.reshape(-1, channels)
    with torch.autocast(h.device.type, enabled=False):
        if (len(d) - units) * channels > units**2:
            x = (d.reshape(-1, units).t() @ x.flatten(1)).reshape(units, *x.shape[1:])
            d = torch.eye(units, dtype=d.dtype, device=d.device).reshape(units, *d.shape[1:])
        x = _over_covariance(seen, x.reshape(-1, channels), ridge).reshape(x.shape)
    return d, x if site.tokens else x.movedim(-1, 1)


def _over_covariance(seen: Tensor, rows: Tensor, ridge: float) -> Tensor:
    r"""The rows `[r, c]` times the inverse of `C + v I`, of the channels `[s, c]` that were seen.

    With fewer samples than channels, by the matrix of the samples, for
    :math:`(H^\top H + v s I)^{-1} = (I - H^\top (H H^\top + v s I)^{-1} H) / (v s)`.
    """
    samples, channels = seen.shape
    if samples < channels:
        root, added = _root(seen @ seen.t(), samples / channels, ridge)
        within = torch.cholesky_solve(seen @ rows.t(), root).t() @ seen
        return (rows - within) * (samples / added)
    root, _ = _root(seen.t() @ seen, 1.0, ridge)
    if len(rows) < 2 * channels:
        return torch.cholesky_solve(rows.t(), root).t() * samples
    unit = torch.eye(channels, dtype=rows.dtype, device=rows.device)
    return rows @ (torch.cholesky_solve(unit, root) * samples)


def _root(products: Tensor, share: float, ridge: float) -> tuple[Tensor, Tensor]:
    """The Cholesky root of the products plus the ridge, and what was added: a part of the mean over channels."""
    size = products.diagonal().mean() * share
    added = ridge * torch.where(size > 0, size, 1.0)
    products.diagonal().add_(added)
    # no check of the root, for which the host would wait for the device
    return torch.linalg.cholesky_ex(products)[0], added
