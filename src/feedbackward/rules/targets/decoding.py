"""What the rules of target propagation share: a ladder of decoders, their learning from noise, and refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from feedbackward.activity import Site, Source
from feedbackward.errors import AttachError
from feedbackward.graph import Edge, Graph
from feedbackward.operators import Operator
from feedbackward.operators.decoder import Decoder, Decoding, MapDecoder
from feedbackward.rule import Rule
from feedbackward.topologies import ladder

if TYPE_CHECKING:
    from feedbackward.engine.phase import Phase


@dataclass(frozen=True)
class Laddered(Rule):
    """A rule whose targets come down from site to site through decoders that learn from noise. Abstract: DTP and SDTP.

    kernel: of the convolution that a decoder from map to map is; 0 for dense decoders.
    normalized: divide a decoder's gradient by what bounds the curvature of its loss.
    """

    sigma: float = 0.25
    activation: str = "linear"
    kernel: int = 3
    normalized: bool = True

    sends_activity = True
    in_phase = True
    linear = False
    learned = True

    def __post_init__(self) -> None:
        refuse_noise(self.label, self.sigma)

    def ladder(self, sites: Sequence[Site], source: Source, beta: float) -> Graph:
        """The graph, with a decoder on every edge."""
        graph = ladder(sites, source, Decoder(self.activation, beta))
        refuse_mixed_tokens(self.label, graph)
        edges = (replace(edge, operator=self._decoder(edge, beta)) for edge in graph.edges)
        return replace(graph, edges=tuple(edges))

    def _decoder(self, edge: Edge, beta: float) -> Operator:
        above, below = edge.source.map, edge.site.map
        # of images and volumes: two dimensions may as well be something else than a map
        if self.kernel and len(above) == len(below) > 2:
            return MapDecoder(self.activation, beta, above, below, self.kernel)
        return edge.operator


def reconstruct(
    phase: Phase,
    sigma: float,
    normalized: bool,
    seen: Callable[[Edge, Tensor], Tensor] = lambda edge, s: s,
) -> None:
    """Let each decoder reconstruct its noisy site from the output of the segment above.

    normalized: see :class:`Laddered`.
    seen: `seen(edge, s)` is the decoder's input.
    """
    with learning(phase):
        clean = phase.forward()
        noisy = {site: h + sigma * phase.noise(h) for site, h in clean.sites.items()}
        # every segment starts from its own noisy site, whatever the segments below have made
        made = phase.forward(change=lambda site, h: noisy[site])
        for edge in phase.edges:
            s, h = rows(edge, made.sources[edge.source.name]), rows(edge, noisy[edge.site])
            read = seen(edge, s)
            loss = (decoder(phase, edge)(read) - h).square().sum() / (len(h) * sigma**2)
            if normalized:
                assert isinstance(edge.operator, Decoder | MapDecoder)
                # twice the mean square slope is the largest that the curvature can be
                loss = loss * sigma**2 / (2 * edge.operator.reach(read))
            descend(phase, edge, loss)


@contextmanager
def learning(phase: Phase) -> Iterator[None]:
    """Compute gradients in full precision, because the changes that noise makes are small."""
    device = phase.weights(phase.edges[0])[0].device
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        yield


def decoder(phase: Phase, edge: Edge) -> Callable[[Tensor], Tensor]:
    """`g(s): [M, *site]` of `s: [M, *source]`."""
    assert isinstance(edge.operator, Decoding)
    return partial(edge.operator.decode, phase.weights(edge), site=edge.site_shape)


def descend(phase: Phase, edge: Edge, loss: Tensor) -> None:
    """Give an edge's decoder the gradient of the loss."""
    phase.give(edge, torch.autograd.grad(loss, phase.weights(edge)[: edge.operator.learnable]))


def rows(edge: Edge, activity: Tensor) -> Tensor:
    """`[M, ...]`."""
    return activity.flatten(0, edge.leading - 1)


def refuse_noise(label: str, sigma: float) -> None:
    if not sigma > 0:
        raise AttachError(
            f"{label}'s decoders learn from noise: sigma is {sigma}, it must be above 0."
        )


def refuse_mixed_tokens(label: str, graph: Graph) -> None:
    """Refuse sites with different M: a target's distance is in units of M."""
    kept = {edge.leading: edge.site.name for edge in graph.edges}
    if len(kept) > 1:
        names = " and ".join(repr(name) for name in kept.values())
        raise AttachError(
            f"{label}: some sites keep their token dimensions and others do not ({names}), so a target would change its distance on "
            "the way. Name sites of one kind with `sites=`, or use DDTP."
        )
