"""Signals that go up: from a site to the next one, through the layers between them in their forward direction."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge

from feedbackward.activity import Site
from feedbackward.engine.hooks import Tape
from feedbackward.errors import AttachError
from feedbackward.graph import Graph, UpwardEdge
from feedbackward.model.autograd_graph import (
    is_leaf,
    is_product,
    leaves,
    not_through_products,
    walk,
)

# autograd's nodes that move elements to other positions
_MOVES = ("Permute", "Transpose", "TBackward", "Flip", "Roll")


class Fork(torch.autograd.Function):
    """Identity on `h`; its backward gives the same gradient to `h` and to `other`, a tensor of the same shape."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, other: Tensor) -> Tensor:
        return h.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad


class Blank(torch.autograd.Function):
    """Zeros of the shape of `h`; their gradient goes to `h`."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return torch.zeros_like(h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Upward:
    """The upward edges of a graph, as its cuts follow them; a number is the place of a site in the graph."""

    def __init__(self, graph: Graph) -> None:
        self._place = {site: place for place, site in enumerate(graph.sites)}
        self._edges = {self._place[edge.below]: edge for edge in graph.upward}

    def __contains__(self, place: int) -> bool:
        return place in self._edges

    def hang(
        self, place: int, tape: Tape, check: Callable[[Site, Tensor | None, int], None]
    ) -> Any:
        """The activity of a site; if an upward edge begins there, its signal also goes on to the site above.

        `check` refuses a site that the pass did not reach.
        """
        h, cut, edge = tape.h[place], tape.cut[place], self._edges.get(place)
        if edge is None:
            return h
        upper = self._place[edge.above]
        above = tape.h[upper]
        check(edge.above, above, tape.versions[upper])
        assert h is not None
        assert cut is not None
        assert above is not None
        return Fork.apply(
            h, response(edge, h, cut, above, Blank.apply(self.hang(upper, tape, check)))
        )


def response(edge: UpwardEdge, h: Tensor, cut: Tensor, above: Tensor, blank: Tensor) -> Tensor:
    r"""A tensor whose gradient `s`, shaped like `h`, gives `blank` the gradient :math:`\partial a_{above} / \partial a_{below}\, s`.

    `a` is the output of the last layer with a weight below a site. `h`, `above`: the two activities, still attached to what
    made them; `cut`: what the layers above `h` got instead; `blank`: zeros shaped like `above`. The derivative of what
    backprop would give below, were `blank` the error above, runs in the forward direction.

    Raises AttachError where the sites are no plain chain.
    """
    _refuse(edge, h, cut, above)
    below_layer = _last_layer(edge, edge.below.name, h)
    above_layer = _last_layer(edge, edge.above.name, above)
    blank = blank.reshape(_shape(above_layer))
    (error,) = torch.autograd.grad(above_layer, cut, blank, create_graph=True)
    (down,) = torch.autograd.grad(h, below_layer, error, create_graph=True)
    return down.reshape(h.shape)


def _refuse(edge: UpwardEdge, h: Tensor, cut: Tensor, above: Tensor) -> None:
    where = f"from site {edge.below.name!r} to {edge.above.name!r}"
    if not h.requires_grad:
        raise AttachError(
            f"signals go up {where} through all layers, but those below {edge.below.name!r} are frozen: leave out its site."
        )
    inputs = {id(leaf) for leaf in leaves(above) if not isinstance(leaf, torch.nn.Parameter)}
    if inputs != {id(cut)}:
        raise AttachError(
            f"signals go up {where}, but {edge.above.name!r} is not made from {edge.below.name!r} alone (a skip path?). Only plain "
            "chains of sites are supported: name such sites, or use a rule that feeds every site directly (DFA, DKP)."
        )


def _last_layer(edge: UpwardEdge, name: str, h: Tensor) -> GradientEdge:
    """The output of the last Linear or convolution below an activity; it must have the activity's shape, or be a view of it."""
    found = list[GradientEdge]()
    astray = ""
    for node in walk([h.grad_fn], not_through_products):
        if is_product(node):
            found.append(GradientEdge(node, 0))
        elif node.name().startswith(_MOVES):
            astray = ", and dimensions change places"
        elif is_leaf(node) and not isinstance(node.variable, torch.nn.Parameter):
            astray = ", and a skip path leads round them"
    if astray or [math.prod(_shape(edge)) for edge in found] != [h.numel()]:
        shapes = " and ".join(str(list(_shape(edge))) for edge in found) or "none"
        raise AttachError(
            f"signals go up from site {edge.below.name!r} to {edge.above.name!r}: site {name!r} of shape {list(h.shape)} must be one "
            f"Linear's or convolution's output after norms and activations, but the layers' outputs are {shapes}"
            f"{astray}. A pool must lie above the site: name the activation in front of "
            "it as the site, or use a rule that feeds every site directly (DFA, DKP)."
        )
    return found[0]


def _shape(edge: GradientEdge) -> tuple[int, ...]:
    return tuple(edge.node._input_metadata[edge.output_nr].shape)
