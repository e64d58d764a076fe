"""Nodes of a graph: rows are mixed along its edges, and are still the same nodes in every layer, unless the model moves them."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import feedbackward as fb

FORMS = ("edges", "pairs", "matrix", "sparse", "table", "buffer", "object")
MOVES = {
    "stay": lambda h: h,
    "flip": lambda h: h.flip(0),
    "roll": lambda h: h.roll(1, 0),
    "swap two": lambda h: h[[1, 0, *range(2, len(h))]],
    "sort": lambda h: h[h.sum(1).argsort()],
}
REFUSED = "does not keep the rows in place"


class GraphNet(nn.Module):
    """Layers `h <- tanh(W (A h))`, with a graph in one of several forms, whose rows may be moved once."""

    def __init__(self, adjacency: Tensor, form: str, layers: int, move: str, width: int) -> None:
        super().__init__()
        sizes = [width] * layers + [3]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.acts = nn.ModuleList(nn.Tanh() for _ in self.layers)
        self.form, self.move = form, move
        if form == "buffer":
            self.register_buffer("graph", adjacency)

    def spread(self, h: Tensor, graph: Any) -> Tensor:
        """`A h`, where `A` is the matrix whose row names those that a node listens to."""
        if self.form == "object":
            graph = graph.edges
        if self.form == "pairs":
            graph = graph.t()
        if self.form in ("edges", "pairs", "object"):
            to, of = graph
            return torch.zeros_like(h).index_add(0, to, h[of])
        if self.form == "table":
            return h[graph].sum(1)
        return (self.graph if self.form == "buffer" else graph) @ h

    def forward(self, x: Tensor, graph: Any = None) -> Tensor:
        for i, (layer, act) in enumerate(zip(self.layers, self.acts, strict=True)):
            x = self.spread(layer(x), graph)
            if i == len(self.layers) - 1:
                return MOVES[self.move](x)
            x = act(x)
        return x


def in_form(adjacency: Tensor, form: str) -> tuple[Any, ...]:
    edges = adjacency.nonzero().t()
    forms = {
        "edges": lambda: edges,
        "pairs": lambda: edges.t(),
        "object": lambda: SimpleNamespace(edges=edges),
        "matrix": lambda: adjacency,
        "sparse": lambda: adjacency.to_sparse(),
        "table": lambda: adjacency.topk(2, 1).indices,
    }
    return (forms[form](),) if form in forms else ()


def graph_of(nodes: int, kind: str, loops: bool, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    if kind == "ring":
        found = torch.eye(nodes).roll(1, 0)
    elif kind == "directed":
        found = (torch.rand(nodes, nodes, generator=draw) < 0.25).float()
    else:
        found = (torch.rand(nodes, nodes, generator=draw) < 0.15).float()
        found = (found + found.t()).clamp(max=1)
    found.fill_diagonal_(float(loops))
    return found


def behind(model: GraphNet, example: tuple[Any, ...], act: nn.Module) -> bool:
    """Whether almost every row of the output depends on another row of this activity more than twice as much as on its own."""
    kept: list[Tensor] = []
    handle = act.register_forward_hook(lambda m, i, o: kept.append(o))
    output = model(*example)
    handle.remove()
    count = 0
    for i, row in enumerate(output):
        (found,) = torch.autograd.grad(row.sum(), kept, retain_graph=True)
        norms = found.norm(dim=1)
        count += bool(norms.max() > 2.5 * norms[i])
    return count > 0.9 * len(output)


@examples(60, 600)
@given(
    st.integers(7, 15),
    st.sampled_from(["ring", "directed", "both ways"]),
    st.sampled_from(FORMS),
    st.integers(2, 4),
    st.sampled_from(sorted(MOVES)),
    st.integers(0, 99),
)
def test_nodes_are_taken_and_moved_rows_are_not(
    nodes: int, kind: str, form: str, layers: int, move: str, seed: int
) -> None:
    torch.manual_seed(seed)
    # a table has two places for each node: itself, and the one before
    adjacency = graph_of(nodes, "ring" if form == "table" else kind, loops=True, seed=seed)
    if form != "table":
        # edges in a ring with loops are as many as would be rows with two numbers each, and nodes without others have no mixing
        adjacency = torch.maximum(adjacency, torch.eye(nodes).roll(2, 0))
    # one more feature than nodes, or as many
    width = nodes + seed % 2
    model = GraphNet(adjacency, form, layers, move, width)
    example = (torch.randn(nodes, width), *in_form(adjacency, form))
    moved = all(behind(model, example, act) for act in model.acts[:-1])
    try:
        fb.attach(model, fb.DFA(), example=example).detach()
        refused = ""
    except fb.AttachError as error:
        refused = str(error)
    if move == "stay":
        assert not refused
    if move != "stay" and moved:
        assert REFUSED in refused


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", [5, 12])
def test_along_directed_edges_other_nodes_may_count_more(form: str, width: int) -> None:
    """Of four layers over a ring with loops, `(I + P)^3 / 8` lies above the first: the node itself counts a third of the next."""
    torch.manual_seed(0)
    adjacency = graph_of(12, "ring", loops=True, seed=0)
    model = GraphNet(adjacency, form, 4, "stay", width)
    fb.attach(model, fb.DFA(), example=(torch.randn(12, width), *in_form(adjacency, form)))


@pytest.mark.parametrize("move", sorted(MOVES.keys() - {"stay", "swap two"}))
def test_a_batch_that_is_mixed_and_then_moved_is_refused(move: str) -> None:
    torch.manual_seed(0)
    dense = torch.eye(12) + 0.1
    model = GraphNet(dense, "matrix", 3, move, 5)
    with pytest.raises(fb.AttachError, match="rows are mixed"):
        fb.attach(model, fb.DFA(), example=(torch.randn(12, 5), dense))


@pytest.mark.parametrize("kind", ["ring", "directed", "both ways"])
@pytest.mark.parametrize("form", ["edges", "matrix"])
def test_nodes_that_do_not_listen_to_themselves_are_refused(kind: str, form: str) -> None:
    """The output of a node is then made of the activities of others: its own error tells nothing about its own activity."""
    torch.manual_seed(0)
    adjacency = graph_of(12, kind, loops=False, seed=3)
    model = GraphNet(adjacency, form, 3, "stay", 5)
    example = (torch.randn(12, 5), *in_form(adjacency, form))
    with pytest.raises(fb.AttachError, match="self loops"):
        fb.attach(model, fb.DFA(), example=example)


def test_looking_at_other_orders_leaves_no_trace() -> None:
    torch.manual_seed(0)
    adjacency = graph_of(12, "ring", loops=True, seed=3)
    model = GraphNet(adjacency, "buffer", 4, "stay", 5)
    model.acts[0] = nn.Sequential(nn.Tanh(), nn.BatchNorm1d(5), nn.Dropout(0.2))
    x = torch.randn(12, 5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    given, random = x.clone(), torch.get_rng_state()
    fb.attach(model, fb.DFA(), example=x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, given)
    assert all(module.training for module in model.modules())
