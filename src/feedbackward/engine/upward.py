"""Signals that go up: from a site to the next one, through the layers between them in their forward direction."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from feedbackward.errors import AttachError
from feedbackward.graph import UpwardEdge
from feedbackward.model.autograd_graph import (
    is_leaf,
    is_product,
    leaves,
    not_through_products,
    walk,
)

# autograd's nodes that move elements to other positions
_MOVES = ("Permute", "Transpose", "TBackward", "Flip", "Roll")


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
