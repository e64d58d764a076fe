"""What the tests of chains have in common: a naive oracle, and small networks of awkward layers."""

from __future__ import annotations

import oracles
import torch
from oracles import Array
from pairs import Pair, grads, loss_fn, mirrored
from test_chain import LAYERS_2D, make
from torch import Tensor, nn

import feedbackward as fb

F64 = torch.float64


def chain_step(
    pair: Pair, model: nn.Sequential, feedback: dict[str, Array]
) -> dict[str, Array | None]:
    """Every parameter's gradient on the pair's batch when, in the backward pass, each layer's weight is that of `feedback`."""
    layers = [mirrored(name, module) for name, module in model.named_children()]
    x, labels = (t.numpy() for t in pair.batch())
    _, error = oracles.cross_entropy(oracles._forward(layers, x), labels)
    for layer in layers:
        if layer.name in feedback:
            layer.parameters["weight"] = feedback[layer.name]
    grads: dict[str, Array | None] = {}
    oracles._backward(layers, error, grads)
    return grads


def weight_of(learner: fb.Learner, edge: fb.Edge) -> Tensor:
    """The weight of the layer that an layer_input leads to."""
    return learner.model.get_parameter(edge.site.weight)  # type: ignore[attr-defined]


def layer_of(edge: fb.Edge) -> str:
    return edge.site.weight.removesuffix(".weight")  # type: ignore[attr-defined]


def angle(a: Tensor, b: Tensor) -> float:
    """Degrees between two tensors taken whole."""
    cosine = (a * b).sum() / (a.norm() * b.norm())
    return float(torch.rad2deg(torch.acos(cosine.clamp(-1, 1))))


def awkward(name: str) -> tuple[nn.Module, Tensor]:
    """A net around one awkward layer, and its inputs."""
    torch.manual_seed(0)
    model, x = make(LAYERS_2D[name](), 2), torch.randn(5, 2, 9, 8, dtype=F64)
    model(x)  # makes lazy layers
    return model, x


def step(learner: fb.Learner, x: Tensor, y: Tensor) -> dict[str, Tensor | None]:
    learner.zero_grad()
    loss_fn(y)(learner(x)).backward()
    return grads(learner.model)
