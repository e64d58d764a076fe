"""Laws that follow from the theory: when feedback is backprop, how feedback nears the weights, what is cut from what."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from pairs import (
    CONV,
    F64,
    MLP,
    PAIRS,
    TOKENS,
    VIT,
    Pair,
    assert_close,
    exact_grads,
    grads,
    loss_fn,
    signals,
)
from rows import ROWS, Row
from torch import Tensor, nn

import feedbackward as fb


def resnet20() -> Pair:
    """The experiments' ResNet-20 (19 convolutions, skip paths) on 8 x 8 pixels."""
    from feedbackward.experiment.nets import build

    return Pair("resnet20", lambda: build("resnet20", (3, 8, 8), 10), (3, 8, 8), (), 10, ())  # type: ignore[arg-type, return-value]


# --- feedback that is backprop ---------------------------------------------------------------------------------


def test_linear_net_with_path_products_as_feedback_is_backprop() -> None:
    """Without nonlinearities W_L ... W_{l+1} is the Jacobian of every sample."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 8), nn.Linear(8, 4), nn.Linear(4, 3)).to(
        F64
    )
    x, y = torch.randn(7, 6, dtype=F64), torch.randint(3, (7,))
    learner = fb.attach(model, fb.DFA(), example=x)
    path = torch.eye(3, dtype=F64)
    for edge in reversed(learner.graph.edges):
        path = path @ model[int(edge.site.name) + 1].weight.detach()
        learner.feedback_of(edge).copy_(path)
    signals(learner, x, y)
    for name, gradient in exact_grads(model, x, y).items():
        assert_close(grads(model)[name], gradient, name)


@dataclass(frozen=True, eq=False)
class Told(fb.Operator):
    """Sends what it was told, sample by sample, whatever the error is."""

    name: str
    told: dict[str, Tensor]

    def create(self, source: fb.Shape, site: fb.Shape, generator: torch.Generator) -> fb.Weights:
        return (torch.zeros(1),)

    def send(self, weights: fb.Weights, d: Tensor, site: fb.Shape) -> Tensor:
        return self.told[self.name]

    def macs(self, source: fb.Shape, site: fb.Shape) -> int:
        return 0

    def bytes(self, source: fb.Shape, site: fb.Shape) -> int:
        return 4


@dataclass(frozen=True, eq=False)
class TrueSignals(fb.Rule):
    """Cuts as any direct rule makes them, fed with backprop's own signals."""

    told: dict[str, Tensor]
    label = "told"

    def graph(self, sites: Sequence[fb.Site], source: fb.Source) -> fb.Graph:
        return fb.Graph(
            tuple(sites), tuple(fb.Edge(source, site, Told(site.name, self.told)) for site in sites)
        )


@pytest.mark.parametrize(
    ("pair", "sites"),
    [*((lambda p=p: p, p.sites) for p in PAIRS), (resnet20, "layers"), (resnet20, "blocks")],
    ids=[*map(str, PAIRS), "resnet20-layers", "resnet20-blocks"],
)
def test_cuts_with_the_true_signals_are_backprop(pair: Callable[[], Pair], sites: object) -> None:
    """Whatever norm, pool or skip path lies between the cuts."""
    pair = pair()
    model = pair.model()
    x, y = pair.batch()
    told: dict[str, Tensor] = {}
    learner = pair.attach(TrueSignals(told), model, sites=sites)
    with learner.exact():
        told |= signals(learner, x, y)
    truth = grads(model)
    assert max(s.abs().max() for s in told.values()) > 1e-3
    model.zero_grad()
    signals(learner, x, y)
    for name, gradient in grads(model).items():
        assert_close(gradient, truth[name], name, tolerance=1e-10)


# --- learned feedback nears the weights ------------------------------------------------------------------------

RATE, DECAY, STEPS = 0.1, 0.02, 50


def plain(steps: int) -> float:
    return (1 - RATE * DECAY) ** steps


def momentum(nesterov: bool) -> Callable[[int], float]:
    """W - B sees no error, only its own decay, through the same momentum as the weights."""

    def run(steps: int) -> float:
        difference, velocity = 1.0, 0.0
        for _ in range(steps):
            gradient = DECAY * difference
            velocity = 0.9 * velocity + gradient
            difference -= RATE * (gradient + 0.9 * velocity if nesterov else velocity)
        return difference

    return run


SGD = {"lr": RATE, "weight_decay": DECAY}
OPTIMIZERS = {
    "sgd": (torch.optim.SGD, SGD, plain),
    "sgd-momentum": (torch.optim.SGD, {**SGD, "momentum": 0.9}, momentum(False)),
    "sgd-nesterov": (torch.optim.SGD, {**SGD, "momentum": 0.9, "nesterov": True}, momentum(True)),
    "adamw": (
        torch.optim.AdamW,
        SGD,
        plain,
    ),  # equal gradients, equal Adam steps; the decay is apart from them
    "adam-no-decay": (torch.optim.Adam, {"lr": RATE}, lambda steps: 1.0),
}


def last_hidden_conv() -> nn.Sequential:
    layers = OrderedDict(
        conv=nn.Conv2d(2, 3, 3), act=nn.ReLU(), flat=nn.Flatten(), head=nn.Linear(48, 3)
    )
    return nn.Sequential(layers)


SPATIAL = Pair("spatial", last_hidden_conv, (2, 6, 6), (), 3, ("act",), sites=["act"])


@pytest.mark.parametrize("pair", [MLP, CONV, TOKENS, SPATIAL], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_kolen_pollack_at_the_last_hidden_layer(name: str, pair: Pair) -> None:
    """DKP's gradient of B there equals that of W: the difference follows the optimizer's decay alone."""
    kind, options, shrinks = OPTIMIZERS[name]
    model = pair.model()
    learner = pair.attach(fb.DKP.published(), model)
    optimizer = kind(learner.parameters(), **options)
    W, B = model.head.weight, learner.feedback_of(learner.graph.edges[-1])
    first, before = (W - B.flatten(1)).detach().clone(), W.detach().clone()
    for t in range(STEPS):
        x, y = pair.batch(seed=t)
        optimizer.zero_grad()
        loss_fn(y)(learner(x)).backward()
        optimizer.step()
    assert (W - before).abs().max() > 0.05
    assert_close((W - B.flatten(1)).detach(), first * shrinks(STEPS), tolerance=1e-10)


def test_one_step_uses_the_feedback_from_before_the_update() -> None:
    """delta h_l = e B_l with the B of the forward pass: W and B may be stepped in any order."""
    x, y = MLP.batch()
    after = []
    for feedback_first in (True, False):
        learner = MLP.attach(fb.DKP.published())
        loss_fn(y)(learner(x)).backward()
        groups = [learner.feedback.parameters(), learner.model.parameters()]
        for group in groups if feedback_first else reversed(groups):
            torch.optim.SGD(group, lr=0.1).step()
        after.append(learner.state_dict())
    assert all(torch.equal(after[0][key], after[1][key]) for key in after[0])


# --- what is cut from what -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", [MLP, CONV, TOKENS, VIT], ids=str)
def test_frozen_hidden_layers_do_not_move(pair: Pair) -> None:
    model = pair.model()
    x, y = pair.batch()
    truth = exact_grads(model, x, y)
    before = copy.deepcopy(model.state_dict())
    learner = pair.attach(fb.Frozen(), model)
    assert not list(learner.feedback.parameters())
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.5, weight_decay=0.1, momentum=0.9)
    signals(learner, x, y)
    for name, gradient in grads(model).items():
        assert_close(gradient, truth[name] if name in pair.head() else None, name)
    optimizer.step()
    statistics = [key for key in before if "running" in key]
    assert len(statistics) == (4 if pair is CONV else 0)
    moved = {
        key for key, value in model.state_dict().items() if not torch.equal(value, before[key])
    }
    assert {key for key in moved if "num_batches" not in key} == {*pair.head(), *statistics}


@pytest.mark.parametrize(
    ("pair", "sites"),
    [
        (lambda: MLP, "layers"),
        (lambda: CONV, "layers"),
        (lambda: VIT, "layers"),
        (resnet20, "layers"),
        (resnet20, "blocks"),
    ],
    ids=["mlp", "conv", "vit", "resnet20-layers", "resnet20-blocks"],
)
def test_no_true_gradient_leaks_and_feedback_stays_in_its_segment(
    pair: Callable[[], Pair], sites: object
) -> None:
    """With every B = 0 only the head learns; with one B only the segment below it, too."""
    pair = pair()
    model = pair.model()
    x, y = pair.batch()
    truth = exact_grads(model, x, y)
    learner = pair.attach(fb.DKP.published(operator=fb.Dense("zeros")), model, sites=sites)
    head = set(learner.plan.head.parameters)
    assert not learner.plan.shared
    assert not learner.plan.unreached
    held = [
        name
        for segment in (*learner.plan.segments, learner.plan.head)
        for name in segment.parameters
    ]
    assert sorted(held) == sorted(truth)

    def moving() -> set[str]:
        model.zero_grad()
        loss_fn(y)(learner(x)).backward()
        return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}

    assert moving() == head
    for name in head:
        assert_close(model.get_parameter(name).grad, truth[name], name)
    for edge, segment in zip(learner.graph.edges, learner.plan.segments, strict=True):
        B = learner.feedback_of(edge)
        nn.init.normal_(B)
        found = moving()
        assert found == head | set(segment.parameters), edge.site.name
        nn.init.zeros_(B)


# --- the model as it was ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("pair", [CONV, TOKENS], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_forward_is_bit_identical(row: Row, pair: Pair, dtype: torch.dtype) -> None:
    """Outputs, running statistics and dropout masks are those of the plain model."""
    layers = list(pair.model().named_children())
    middle = ("drop", nn.Dropout(0.3))
    model = nn.Sequential(
        OrderedDict([*layers[:4], middle, *layers[4:], ("last", nn.Dropout(0.5))])
    ).to(dtype)
    twin = copy.deepcopy(model)
    x = pair.batch()[0].to(dtype)
    learner = fb.attach(model, row.rule, example=x, error_at="head")
    for mode in (True, False):
        torch.manual_seed(7)
        expected = twin.train(mode)(x)
        torch.manual_seed(7)
        assert torch.equal(learner.train(mode)(x), expected)
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("pair", [CONV, TOKENS], ids=str)
def test_attach_changes_nothing_and_detach_leaves_nothing(row: Row, pair: Pair) -> None:
    model = pair.model()
    x, y = pair.batch()
    truth, state = exact_grads(model, x, y), copy.deepcopy(model.state_dict())
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    random = torch.get_rng_state()
    learner = pair.attach(row.rule, model)
    assert torch.equal(torch.get_rng_state(), random)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes

    def same(run: Callable[[Tensor], Tensor], what: str) -> None:
        model.zero_grad()
        loss_fn(y)(run(x)).backward()
        for name, gradient in grads(model).items():
            assert_close(gradient, truth[name], f"{what}: {name}", tolerance=0.0)

    with learner.exact():
        same(learner, "exact")
    same(model, "the model called directly")
    plain_model = learner.detach()
    assert plain_model is model
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    same(plain_model, "detached")
    with pytest.raises(fb.AttachError, match="attach"):
        learner(x)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_state_dict_round_trip(row: Row) -> None:
    """A learner built anew from another seed becomes the same learner, feedback included."""
    x, y = CONV.batch()
    first, second = CONV.attach(row.rule), CONV.attach(row.rule, CONV.model(seed=5), seed=5)
    assert {key.split(".")[0] for key in first.state_dict()} == (
        {"model", "feedback"} if row.direct else {"model"}
    )
    signals(first, x, y)
    torch.optim.SGD(first.parameters(), lr=0.1).step()
    second.load_state_dict(first.state_dict())
    for learner in (first, second):
        learner.zero_grad()
        signals(learner, x, y)
    for (name, a), b in zip(grads(first).items(), grads(second).values(), strict=True):
        assert_close(a, b, name, tolerance=0.0)


@pytest.mark.parametrize("pair", [CONV, TOKENS], ids=str)
def test_backprop_as_a_rule_is_the_bare_model(pair: Pair) -> None:
    """No hook, and autograd's graph has the same nodes in the same order."""

    def walk(tensor: Tensor) -> list[str]:
        names, stack = [], [tensor.grad_fn]
        while stack:
            node = stack.pop()
            if node is not None:
                names.append(node.name())
                stack += [parent for parent, _ in node.next_functions]
        return names

    model = pair.model()
    x, y = pair.batch()
    bare = walk(loss_fn(y)(model(x)))
    learner = pair.attach(fb.BP(), model)
    assert not any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules()
    )
    assert walk(loss_fn(y)(learner(x))) == bare
    assert not list(learner.feedback.parameters())
