"""Relays: which layers they are, what their edges learn, and when that is backprop."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from pairs import F64, assert_close, grads
from torch import Tensor, nn
from torch.nn import functional as F

import feedbackward as fb
from feedbackward.engine.phase import Phase
from feedbackward.model.autograd_graph import dominators
from feedbackward.operators.layer import LayerForm, LayerShaped


def attached(model: nn.Module, x: Tensor, **options: int) -> fb.Learner:
    return fb.attach(model.to(x.dtype), fb.rules.RelayedKP(**options), example=x)


def linear_net() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(i, o) for i, o in itertools.pairwise((5, 6, 4, 5, 4, 3)))).to(
        F64
    )
    return model, torch.randn(40, 5, dtype=F64)


def paths(learner: fb.Learner) -> list[Tensor]:
    """For every edge of a linear net, the product of the weights from its site to its relay."""
    layers = dict(learner.model.named_children())
    found = []
    for edge in learner.graph.edges:
        first, last = int(edge.site.name.split(".")[0]), int(edge.source.name)
        product = torch.eye(layers[str(last)].out_features, dtype=F64)
        for place in range(last, first - 1, -1):
            product = product @ layers[str(place)].weight.detach()
        found.append(product)
    return found


def runs(learner: fb.Learner) -> list[tuple[str, list[str]]]:
    """Each relay and the layers that it feeds the inputs of."""
    pairs = (
        (edge.source.name, edge.site.name.removesuffix(".input")) for edge in learner.graph.edges
    )
    return [
        (relay, [layer for _, layer in group])
        for relay, group in itertools.groupby(pairs, lambda p: p[0])
    ]


# --- which layers are relays -----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 9])
@pytest.mark.parametrize(
    "widths", [(8, 8, 8, 8, 8, 8), (4, 32, 2, 16, 4, 8, 3)], ids=["even", "uneven"]
)
def test_the_runs_pass_over_as_little_as_possible(widths: tuple[int, ...], steps: int) -> None:
    """Against all partitions: a layer between a site and its relay counts 1, and the logarithm of how much larger it is."""
    model = nn.Sequential(*(nn.Linear(i, o) for i, o in itertools.pairwise(widths)))
    learner = attached(model, torch.randn(4, widths[0]), steps=steps)
    outs, count = widths[1:], len(widths) - 1  # layer_inputs: the inputs of layers 1 .. count - 1

    def cost(ends: tuple[int, ...]) -> float:
        total, begin = 0.0, 1
        for end in ends:
            for site in range(begin, end + 1):
                total += sum(1 + max(0, math.log2(outs[j] / outs[end])) for j in range(site, end))
            begin = end + 1
        return total

    inner = range(1, count - 1)
    partitions = [
        (*cut, count - 1) for n in range(steps) for cut in itertools.combinations(inner, n)
    ]
    taken = tuple(int(relay) for relay, _ in runs(learner))
    assert len(taken) == min(steps, count - 1)
    assert cost(taken) == pytest.approx(min(map(cost, partitions)))
    fed = [int(layer) for _, layers in runs(learner) for layer in layers]
    assert fed == list(range(1, count))


@pytest.mark.nightly
def test_vgg16_takes_five_steps_and_feeds_every_layer() -> None:
    nets = pytest.importorskip(
        "feedbackward.experiment.nets"
    )  # left out when single lines are changed
    model = nets.build("vgg16", (3, 32, 32), 10)
    learner = attached(model, torch.randn(2, 3, 32, 32))
    assert len(learner.graph.sources) == 5
    assert len(learner.graph.edges) == 15
    assert learner.plan.unreached == ()
    assert {*runs(learner)[-1][1]} == {"head"}  # the ten classes pass over nothing


@pytest.mark.nightly
def test_a_net_with_fewer_layers_than_steps_is_fed_layer_by_layer() -> None:
    nets = pytest.importorskip(
        "feedbackward.experiment.nets"
    )  # left out when single lines are changed
    model = nets.build("small_cnn", (3, 32, 32), 10)
    learner = attached(model, torch.randn(2, 3, 32, 32))
    assert all(edge.source == edge.site.source for edge in learner.graph.edges)  # type: ignore[attr-defined]


class Branched(nn.Module):
    """A skip connection round the second and third layer; with `forked`, one round the last as well."""

    def __init__(self, forked: bool = False) -> None:
        super().__init__()
        self.forked = forked
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        g = (self.c(self.b(h).relu()) + h).relu()
        return self.d(g) + g if self.forked else self.d(g)


def test_a_relay_is_a_layer_that_nothing_leads_round() -> None:
    x = torch.randn(3, 4)
    assert runs(attached(Branched(), x, steps=2)) == [("b", ["b"]), ("d", ["c", "d"])]
    assert runs(attached(Branched(), x, steps=1)) == [("d", ["b", "c", "d"])]
    with pytest.raises(fb.AttachError, match=r"no 2 layers can relay the error.*here: none"):
        attached(Branched(forked=True), x, steps=2)
    attached(Branched(forked=True), x, steps=3)  # every layer by itself
    with pytest.raises(fb.AttachError, match="needs steps >= 1"):
        fb.rules.RelayedKP(steps=0)
    with pytest.raises(fb.AttachError, match="size >= 1"):
        fb.rules.RelayedKP(size=0)


def test_narrow_is_where_nothing_leads_round() -> None:
    """Against the definition: without the node, no activity that was made before it reaches the output."""
    torch.manual_seed(0)
    h = torch.randn(4, requires_grad=True) * 2
    made = [h]
    for kind in ("line", "skip", "line", "join", "line"):
        h = (
            h.sin()
            if kind == "line"
            else h.cos() + made[-2]
            if kind == "skip"
            else h * made[-1].exp()
        )
        made.append(h)
    end = h.sum()
    nodes, stack = set(), [end.grad_fn]
    while stack:
        node = stack.pop()
        if node.next_functions and node not in nodes:
            nodes.add(node)
            stack += [n for n, _ in node.next_functions if n is not None]

    def reaches(start: object, without: object) -> bool:
        seen, todo = set(), [end.grad_fn]
        while todo:
            node = todo.pop()
            if node is None or node is without or node in seen:
                continue
            if node is start:
                return True
            seen.add(node)
            todo += [n for n, _ in node.next_functions]
        return False

    def below(node: object) -> set[object]:
        found, todo = set(), [n for n, _ in node.next_functions]  # type: ignore[attr-defined]
        while todo:
            n = todo.pop()
            if n in nodes and n not in found:
                found.add(n)
                todo += [m for m, _ in n.next_functions]
        return found

    aside = {
        n
        for n in nodes
        if all(n not in below(m) and m not in below(n) for m in nodes if m is not n)
    }
    assert not aside
    expected = {
        n
        for n in nodes
        if not any(reaches(b, without=n) for b in below(n))
        and all(m is n or m in below(n) or n in below(m) for m in nodes)
    }
    assert dominators(end) == expected


# --- what the edges learn --------------------------------------------------------------------------------------


def test_on_a_linear_net_feedback_nears_the_path_to_its_relay() -> None:
    """E[J_hat] = W_r ... W_l over more layers than the relay's own. The entry (c, j) has the variance
    (sum_k |J_k[c]|^2 + J_l[c, j]^2) / samples, where k runs over the sites that the relay feeds so; here it is one."""
    model, x = linear_net()
    learner = attached(model, x, steps=2)
    assert len(learner.graph.sources) == 2
    phases = 300
    for _ in range(phases):
        learner.feedback_step(x)
    ratios = []
    assert [edge.shares for edge in learner.graph.edges] == [None, "2.weight", None, "4.weight"]
    for edge, J in zip(learner.graph.edges, paths(learner), strict=True):
        if edge.shares:
            assert learner.feedback_of(edge).grad is None
            continue
        mean = -learner.feedback_of(edge).grad / phases  # B is zero
        variance = (J.square().sum(1, keepdim=True) + J.square()) / (phases * 32)
        ratios.append(((mean - J) / variance.sqrt()).flatten())
    assert torch.cat(ratios).abs().max() < 5
    assert torch.cat(ratios).square().mean() == pytest.approx(1, abs=0.7)  # not smaller either


def test_the_first_samples_of_the_batch_are_taken() -> None:
    model, x = linear_net()
    seen: list[Tensor] = []
    learner = attached(model, x, steps=2, samples=7)
    handle = model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    learner.feedback_step(x)
    learner.feedback_step(x[:5])
    handle.remove()
    assert [len(t) for t in seen] == [7, 5]
    assert torch.equal(seen[0], x[:7])


def test_over_its_own_layer_the_feedback_keeps_its_distance_to_the_weight() -> None:
    """Kolen-Pollack: under momentum, with one rate and decay for both, what is left of W - B depends on these alone."""
    model, x = linear_net()
    learner = attached(model, x, steps=2)
    near = [e for e in learner.graph.edges if e.shares]

    def difference() -> list[Tensor]:
        return [
            model.get_parameter(e.shares).detach() - learner.feedback_of(e).detach() for e in near
        ]

    def settings(params: list[Tensor]) -> torch.optim.SGD:
        return torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.05)

    assert near
    alone = [nn.Parameter(d.clone()) for d in difference()]
    decayed, trained = settings(alone), settings(list(learner.parameters()))
    y = torch.arange(len(x)) % 3
    for _ in range(20):
        for optimizer in (decayed, trained):
            optimizer.zero_grad()
        F.cross_entropy(learner(x), y).backward()
        learner.feedback_step(x)
        for p in alone:
            p.grad = torch.zeros_like(p)
        for optimizer in (decayed, trained):
            optimizer.step()
    for found, expected in zip(difference(), alone, strict=True):
        assert_close(found, expected.detach(), "W - B")


def test_a_relay_moves_by_the_noise_of_its_own_sites_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = linear_net()
    learner = attached(model, x, steps=2, samples=len(x))
    drawn: list[Tensor] = []
    draw = Phase.noise
    monkeypatch.setattr(
        Phase, "noise", lambda self, like: drawn.append(draw(self, like)) or drawn[-1]
    )
    learner.feedback_step(x)
    far = [i for i, edge in enumerate(learner.graph.edges) if edge.shares is None]
    truth = paths(learner)
    for i, u in zip(far, drawn, strict=True):
        edge = learner.graph.edges[i]
        assert_close(
            learner.feedback_of(edge).grad, -(u @ truth[i].t()).t() @ u / len(x), edge.site.name
        )


def test_a_kernel_is_the_average_over_the_places_of_the_map(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """grad B[o, i, t] = B - mean over samples and places y of d[o, y] u[i, s y + t - p], within the map."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(2, 3, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(3, 2, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
    ]
    top = [nn.Conv2d(2, 3, 3, padding=1), nn.Flatten(), nn.Linear(27, 4)]
    model = nn.Sequential(*layers, *top)
    x = torch.randn(3, 2, 6, 6, dtype=F64)
    learner = attached(model, x, steps=2, size=3)
    edge = next(e for e in learner.graph.edges if e.site.name == "2.input")
    assert edge.source.name == "5"
    drawn: dict[tuple[int, ...], Tensor] = {}
    draw = Phase.noise

    def keep(phase: Phase, like: Tensor) -> Tensor:
        u = draw(phase, like)
        drawn[tuple(like.shape)] = u
        return u

    monkeypatch.setattr(Phase, "noise", keep)
    learner.feedback_step(x)
    h = model[:2](x).detach().requires_grad_()
    u = drawn[tuple(h.shape)]
    moves = torch.autograd.functional.jvp(model[2:6], h, u)[1]
    B = learner.feedback_of(edge)
    k = B.shape[-1]
    assert B.shape == (3, 3, 4, 4)  # side 3, and 1 for the pool's stride
    stride, pad = 2, ((3 - 1) * 2 + k - 6) // 2
    expected = torch.zeros_like(B)
    for o, i, a, b in np.ndindex(*B.shape):
        total, places = 0.0, 0
        for y, z in np.ndindex(3, 3):
            row, column = stride * y + a - pad, stride * z + b - pad
            if 0 <= row < 6 and 0 <= column < 6:
                places += 1
                total += (moves[:, o, y, z] * u[:, i, row, column]).mean()
        expected[o, i, a, b] = -total / places
    assert_close(B.grad, expected, edge.site.name)


@pytest.mark.parametrize(
    ("source", "site", "size"),
    [((4, 8, 8), (2, 8, 8), 5), ((4, 8, 8), (2, 16, 16), 5), ((4, 7, 7), (2, 15, 15), 3), ((4, 4, 4), (2, 7, 7), 5),
     ((4, 28, 28), (2, 30, 30), 3), ((3, 1), (2, 9), 3), ((3, 2, 2), (2, 32, 32), 5), ((2, 6, 3), (1, 6, 6), 1)],
)  # fmt: skip
def test_a_convolution_is_found_between_any_two_maps(
    source: tuple[int, ...], site: tuple[int, ...], size: int
) -> None:
    form = LayerForm.between(source, site, size)
    operator = LayerShaped(form, "normal")
    (B,) = operator.create(source, site, torch.Generator().manual_seed(0))
    made = operator.project(B, torch.ones(1, *site))
    assert made.shape == (1, *source)
    assert operator.send((B,), torch.ones(1, *source), site).shape == (1, *site)
    assert all(side >= size for side in form.shape[2:])


# --- when the signals are backprop's ---------------------------------------------------------------------------


def exact(learner: fb.Learner, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    learner.model.zero_grad()
    with learner.exact():
        F.cross_entropy(learner(x), y).backward()
    return grads(learner.model)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_with_the_path_as_feedback_a_linear_net_has_the_gradients_of_backprop(steps: int) -> None:
    model, x = linear_net()
    y = torch.arange(len(x)) % 3
    learner = attached(model, x, steps=steps)
    for edge, path in zip(learner.graph.edges, paths(learner), strict=True):
        learner.feedback_of(edge).data.copy_(path)
    F.cross_entropy(learner(x), y).backward()
    found, expected = grads(learner.model), exact(learner, x, y)
    for name, grad in expected.items():
        assert_close(found[name], grad, name)


def test_layer_by_layer_with_the_weights_as_feedback_it_is_backprop() -> None:
    """Whatever norms and activations: every edge leads over one layer."""
    torch.manual_seed(0)
    conv = [
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
    ]
    model = nn.Sequential(*conv, nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3))
    x, y = torch.randn(6, 2, 6, 6, dtype=F64), torch.arange(6) % 3
    learner = attached(model, x)
    for edge in learner.graph.edges:
        learner.feedback_of(edge).data.copy_(learner.model.get_parameter(edge.site.weight).detach())  # type: ignore[attr-defined]
    F.cross_entropy(learner(x), y).backward()
    found, expected = grads(learner.model), exact(learner, x, y)
    for name, grad in expected.items():
        assert_close(found[name], grad, name)
