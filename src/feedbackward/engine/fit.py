"""Whether what a pass made is what its graph was made for: sites that were met, rows that agree, shapes that fit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from feedbackward.activity import Site, Source
from feedbackward.errors import SiteError
from feedbackward.graph import Edge


def check_met(site: Site, h: Tensor | None, version: int) -> None:
    """Refuse a site that the pass did not reach, or that was changed in place afterwards."""
    if h is None:
        raise SiteError(
            f"site {site.name!r} was not reached before the source in this forward pass, so its "
            "layers would not be trained. The model must run the same modules in every training pass; name other sites."
        )
    # a compiler cannot branch on versions; attach's own eager pass has checked them
    if not torch.compiler.is_compiling() and h._version != version:
        raise SiteError(
            f"the activity at site {site.name!r} was changed in place after the cut (an inplace=True activation?), so "
            "feedback would learn from the wrong tensor. Use inplace=False there, or choose the changed tensor as site."
        )


def check_rows(site: Site, kept: Sequence[int], source: Source, rows: Sequence[int]) -> None:
    """Refuse a site whose rows are not as many as those of its source."""
    if tuple(kept) != tuple(rows):
        raise SiteError(
            f"site {site.name!r} has leading dimensions {list(kept)} and the source {source.name!r} {list(rows)}: the batch must "
            "come first and be the same at both, as row i of the source is fed back to row i of the site. Where the rows "
            "between are others (windows, frames, experts, a batch that comes second), name modules around that part as "
            "sites, or the module that makes the site's rows as `error_at`."
        )


def check_fit(edge: Edge, h: Tensor, source: Tensor) -> None:
    """Refuse an activity and a source of whose shapes or types the edge cannot make signals."""
    site = edge.site
    if h.is_complex() or source.is_complex():
        name = site.name if h.is_complex() else edge.source.name
        raise SiteError(
            f"{name!r} is complex, and feedback weights are real: name other sites (`sites=`), or the module that makes real "
            "numbers of it as `error_at`."
        )
    lead, calls = edge.leading, edge.repeats
    fits = (
        h.shape[lead + calls :] == edge.site_shape
        and source.shape[lead + edge.summed :].numel() == edge.source_size
    )
    if edge.operator.sized and not fits:
        raise SiteError(
            f"site {site.name!r} got an activity of shape {list(h.shape)} and its source {list(source.shape)}, but its "
            f"feedback was made for features {list(edge.site_shape)} and {edge.source_size} source units, and fits no others: "
            "resize the inputs, or attach with an example of this size. Maps of any size are fed by operator=fb.Pooled()."
        )
    kept, rows = (*h.shape[:1], *h.shape[1 + calls :][: lead - 1]), source.shape[:lead]
    check_rows(site, kept, edge.source, rows)
    # a layer that gets no rows (an expert) gets no gradient either
    if 0 < rows.numel() < edge.rule.least_batch:
        raise SiteError(
            f"{edge.rule.label} with these options needs a batch of at least {edge.rule.least_batch}, got "
            f"{source.shape[0]} (center=True subtracts the batch mean). Drop the last smaller batch."
        )
