"""torch_geometric: the batch is all nodes of a graph, and a mask says which have labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from client_nets import needed
from torch import nn
from torch.nn import functional as F

import feedbackward as fb

pytestmark = pytest.mark.clients
models = needed("torch_geometric.nn.models")

NODES = 20
X = torch.randn(NODES, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
# a ring, both ways
NEXT = torch.stack([torch.arange(NODES), (torch.arange(NODES) + 1) % NODES])
EDGES = torch.cat([NEXT, NEXT.flip(0)], dim=1)
# three arcs of the ring, which the nodes' own numbers hint at
Y = torch.arange(NODES) * 3 // NODES
X[:, :3] += 2 * F.one_hot(Y, 3)
KNOWN = torch.arange(NODES) % 3 != 0
NETS = ["GCN", "GAT", "GraphSAGE", "GIN"]


# one way only: a ring, and a graph in which most nodes hear of others that do not hear of them
DIRECTED = {"ring": NEXT, "other": torch.cat([NEXT, NEXT[:, ::2] * 7 % NODES], dim=1)}


def net(name: str) -> nn.Module:
    torch.manual_seed(0)
    return getattr(models, name)(5, 8, num_layers=4, out_channels=3, act="tanh").double()


def attached(model: nn.Module, rule: Any) -> fb.Learner:
    sites = [f"convs.{i}" for i in range(3)]
    return fb.attach(model, rule, example=(X, EDGES), sites=sites)


def gradients(learner: fb.Learner) -> dict[str, torch.Tensor]:
    loss = F.cross_entropy(learner(X, EDGES)[KNOWN], Y[KNOWN])
    params = dict(learner.model.named_parameters())
    found = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    return {n: g for n, g in zip(params, found, strict=True) if g is not None}


@pytest.mark.parametrize("name", NETS)
def test_gradients_are_those_of_signals_set_by_hand(name: str) -> None:
    """DFA: each convolution alone, with `e B` as the gradient of its output."""
    model = net(name)
    learner = attached(model, fb.DFA())
    found = gradients(learner)
    outputs: dict[str, torch.Tensor] = {}
    inputs: dict[str, tuple[Any, ...]] = {}

    def keep(module: nn.Module, given: Any, output: torch.Tensor) -> None:
        key = next(n for n, m in model.named_modules() if m is module)
        outputs[key], inputs[key] = output, given

    handles = [conv.register_forward_hook(keep) for conv in model.convs]
    with learner.exact():
        logits = learner(X, EDGES)
    for handle in handles:
        handle.remove()
    logits = logits.detach().requires_grad_()
    (error,) = torch.autograd.grad(F.cross_entropy(logits[KNOWN], Y[KNOWN]), logits)
    for edge in learner.graph.edges:
        B = learner.feedback_of(edge)
        conv = model.get_submodule(edge.site.name)
        own = list(conv.parameters())
        with torch.enable_grad(), learner.exact():
            again = conv(inputs[edge.site.name][0].detach(), EDGES)
        signals = torch.autograd.grad(again, own, (error @ B).to(again.dtype))
        for (key, _), expected in zip(conv.named_parameters(), signals, strict=True):
            torch.testing.assert_close(found[f"{edge.site.name}.{key}"], expected)


@pytest.mark.parametrize("rule", [fb.DFA(), fb.DKP()], ids=lambda rule: rule.name)
@pytest.mark.parametrize("name", NETS)
def test_the_loss_falls(name: str, rule: fb.Rule) -> None:
    learner = attached(net(name), rule)
    optimizer = torch.optim.Adam(fb.param_groups(learner), lr=0.02)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.cross_entropy(learner(X, EDGES)[KNOWN], Y[KNOWN])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("name", NETS)
def test_labels_behind_a_mask_are_not_learned_from(name: str) -> None:
    """Targets of -100: what the hidden labels are changes nothing."""
    found = []
    for hidden in (0, 1):
        learner = attached(net(name), fb.DRTP())
        labels = torch.where(KNOWN, Y, (Y + hidden) % 3)
        learner.target(torch.where(KNOWN, labels, -100))
        found.append(gradients(learner))
    for key, gradient in found[0].items():
        assert torch.equal(gradient, found[1][key]), key


@pytest.mark.parametrize("edges", DIRECTED)
@pytest.mark.parametrize("name", NETS)
def test_directed_edges_are_taken(name: str, edges: str) -> None:
    """A node hears of the ones before it, and more of them than of itself; it is the same node all the same."""
    model = net(name)
    sites = [f"convs.{i}" for i in range(3)]
    fb.attach(model, fb.DFA(), example=(X, DIRECTED[edges]), sites=sites)


def test_nodes_that_do_not_hear_of_themselves_are_refused() -> None:
    kinds = needed("torch_geometric.nn")
    layers = [
        (kinds.GCNConv(*s, add_self_loops=False), "x, e -> x") for s in ((5, 8), (8, 8), (8, 3))
    ]
    model = kinds.Sequential("x, e", layers).double()
    with pytest.raises(fb.AttachError, match="self loops"):
        fb.attach(model, fb.DFA(), example=(X, EDGES), sites=["module_0", "module_1"])


@pytest.mark.parametrize("name", NETS)
def test_layers_are_found_and_feedback_of_zero_leaves_the_last_one_alone(name: str) -> None:
    """Its Linear is not torch's. What enters the layers of the last convolution is cut, and so is all below."""
    model = net(name)
    learner = fb.attach(model, fb.DFA(), example=(X, EDGES), sites="layers")
    assert len(learner.sites) >= 2
    assert learner.plan.unreached == ()
    with torch.no_grad():
        for B in learner.feedback.buffers():
            B.zero_()
    params = dict(model.named_parameters())
    loss = F.cross_entropy(model(X, EDGES)[KNOWN], Y[KNOWN])
    truth = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
    found = gradients(learner)
    moved = {n for n, g in found.items() if g.abs().max() > 0}
    assert moved == set(learner.plan.head.parameters)
    for n in moved:
        torch.testing.assert_close(found[n], truth[n])
