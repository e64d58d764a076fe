"""Activities whose channels are made uncorrelated, for the learning of direct feedback."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from feedbackward.activity import Site
from feedbackward.operators.base import widened


def has_places(site: Site, h: Tensor) -> bool:
    """Whether the channels are seen in many places, so that a batch tells their covariance."""
    return h.dim() > 2 or site.tokens > 0


def whitened(site: Site, d: Tensor, h: Tensor, center: bool, ridge: float) -> tuple[Tensor, Tensor]:
    r"""Errors `[K, *source]` and activities `[K, *site]`, in float32 or wider, whose product is `d^T h C^-1`.

    .. math:: d^\top h\, (C + \mathrm{ridge} \cdot \bar v\, I)^{-1}, \qquad
        C = \operatorname{mean}_{m,p}\, (h_{mp} - \bar h_p) (h_{mp} - \bar h_p)^\top \quad [c, c]

    over samples m and places p of a map `[c, *places]` (or tokens `[*tokens, c]`). :math:`\bar h` is the mean over samples
    (0 for a batch of one) and :math:`\bar v` the mean variance of a channel. `center` takes :math:`h - \bar h` for h.

    K is M, the samples, with `d` as it is; or the units of the source, with :math:`d^\top h` in place of the activity and the
    identity in place of the error, where it is less work to whiten those.
    """
    h = widened(h)
    d = d.to(h.dtype)
    centred = h - h.mean(0) if len(h) > 1 else h
    h = centred if center else h
    units = math.prod(d.shape[1:])
    # views with the channels last; what is smaller is moved, for maps are large
    seen, rows = (t if site.tokens else t.movedim(1, -1) for t in (centred, h))
    with torch.autocast(h.device.type, enabled=False):
        if (len(d) - units) * seen.shape[-1] > units**2:
            last = site.tokens > 0 or rows.is_contiguous()
            laid = rows if last else h
            rows = (d.reshape(-1, units).t() @ laid.flatten(1)).reshape(units, *laid.shape[1:])
            rows = rows if last else rows.movedim(1, -1)
            d = torch.eye(units, dtype=d.dtype, device=d.device).reshape(units, *d.shape[1:])
        x = _over_covariance(seen, rows, ridge)
    return d, x if site.tokens else x.movedim(-1, 1)


def _over_covariance(seen: Tensor, rows: Tensor, ridge: float) -> Tensor:
    r"""The rows `[..., c]` times the inverse of `C + v I`, of the channels `[M, ..., c]` that were seen.

    With fewer samples than channels, by the matrix of the samples, for
    :math:`(H^\top H + v s I)^{-1} = (I - H^\top (H H^\top + v s I)^{-1} H) / (v s)`.
    """
    shape, channels = rows.shape, seen.shape[-1]
    rows, maps = rows.reshape(-1, channels), seen.reshape(len(seen), -1, channels)
    samples = maps.numel() // channels
    if samples < channels:
        flat = maps.reshape(-1, channels)
        root, added = _root(flat @ flat.t(), samples / channels, ridge)
        within = torch.cholesky_solve(flat @ rows.t(), root).t() @ flat
        return ((rows - within) * (samples / added)).reshape(shape)
    root, _ = _root(_scatter(maps), 1.0, ridge)
    if len(rows) < 2 * channels:
        return (torch.cholesky_solve(rows.t(), root).t() * samples).reshape(shape)
    unit = torch.eye(channels, dtype=rows.dtype, device=rows.device)
    return (rows @ (torch.cholesky_solve(unit, root) * samples)).reshape(shape)


def _scatter(maps: Tensor) -> Tensor:
    """Of `[M, places, c]` the products of the channels, summed. Large maps stay where they are."""
    if maps.is_contiguous() or maps.shape[1] < maps.shape[2]:
        flat = maps.reshape(-1, maps.shape[-1])
        return flat.t() @ flat
    return (maps.transpose(1, 2) @ maps).sum(0)


def _root(products: Tensor, share: float, ridge: float) -> tuple[Tensor, Tensor]:
    """The Cholesky root of the products plus the ridge, and what was added: a part of the mean over channels."""
    size = products.diagonal().mean() * share
    added = ridge * torch.where(size > 0, size, 1.0)
    products.diagonal().add_(added)
    # no check of the root, for which the host would wait for the device
    return torch.linalg.cholesky_ex(products)[0], added
