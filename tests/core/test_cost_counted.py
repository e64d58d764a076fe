"""The cost of a step against what `torch.utils.flop_counter` and autograd's hooks count in real ones, on models of all kinds."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import zoo
from priced import N, TokenNet, counted, macs_of_a_step, mlp, single_products
from torch import Tensor, nn
from torch.nn import functional as F

import feedbackward as fb
from feedbackward.experiment import nets

CHAINS = (fb.FA(), fb.KolenPollack(), fb.rules.SymmetricAlignment(), fb.rules.PFA())
ALL = (fb.BP(), *CHAINS, fb.DFA(), fb.DKP.published(), fb.DRTP(), fb.DGL(), fb.Frozen())


@dataclass(frozen=True)
class Example:
    name: str
    model: nn.Module
    x: Tensor
    y: Tensor

    def __str__(self) -> str:
        return self.name


def examples() -> Iterator[Example]:
    torch.manual_seed(0)
    y = torch.randint(3, (N,))
    yield Example("mlp", mlp(6, 8, 5, 3), torch.randn(N, 6), y)
    yield Example("small_cnn", nets.build("small_cnn", (3, 8, 8), 3), torch.randn(N, 3, 8, 8), y)
    yield Example("vgg6", nets.build("vgg6", (3, 8, 8), 3), torch.randn(N, 3, 8, 8), y)
    yield Example("resnet", zoo.build(zoo.case("resnet"))[0], torch.randn(N, 2, 8, 8), y)
    yield Example("tokens", TokenNet(), torch.randn(N, 7, 5), torch.randint(3, (N, 7)))


EXAMPLES = pytest.mark.parametrize("example", list(examples()), ids=str)


@EXAMPLES
@pytest.mark.parametrize("rule", ALL, ids=lambda rule: rule.name)
def test_multiply_adds_are_those_of_a_real_step(example: Example, rule: fb.Rule) -> None:
    learner = fb.attach(example.model, rule, example=example.x)

    def loss_fn(out: Tensor) -> Tensor:
        return F.cross_entropy(out.flatten(0, -2), example.y.flatten())

    expected = macs_of_a_step(learner, example.x, loss_fn, example.y)
    cost = fb.count_cost(learner, example.x)
    learner.detach()
    assert cost.total == expected
    parts = (cost.forward, cost.weight_gradients, cost.input_gradients)
    for kind, part in zip(("forward", "weight_gradients", "input_gradients"), parts, strict=True):
        assert sum(layer[kind] for layer in cost.layers.values()) == part


def saved_bytes(learner: fb.Learner, x: Any, loss_fn: Any, y: Tensor) -> int:
    """Bytes of the distinct storages that autograd saves in a real pass, without weights and buffers."""
    known = {t.untyped_storage().data_ptr() for t in (*learner.parameters(), *learner.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in known:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    if learner.attached.needs_target:
        learner.target(y)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), single_products():
        loss_fn(learner(x))
    return sum(t.untyped_storage().nbytes() for t in kept.values())


@EXAMPLES
@pytest.mark.parametrize(
    "rule", [fb.BP(), fb.KolenPollack(), fb.DKP.published(), fb.DGL()], ids=lambda rule: rule.name
)
def test_bytes_held_are_those_of_a_real_pass(example: Example, rule: fb.Rule) -> None:
    learner = fb.attach(example.model, rule, example=example.x)
    expected = saved_bytes(learner, example.x, lambda out: out.sum(), example.y)
    held = fb.count_cost(learner, example.x).held
    learner.detach()
    assert held["joint"] == expected
    assert all(size is None or size <= expected for size in held.values())


def grouped(case: zoo.Case) -> bool:
    """torch's counter forgets the groups of a convolution in the backward pass."""
    return any(getattr(module, "groups", 1) > 1 for module in zoo.build(case)[0].modules())


@pytest.mark.parametrize("case", [c for c in zoo.ZOO if not grouped(c)], ids=lambda c: c.name)
@pytest.mark.parametrize("rule", [fb.BP(), fb.DKP.published()], ids=["bp", "dkp"])
def test_models_of_all_kinds(case: zoo.Case, rule: fb.Rule) -> None:
    model, x = zoo.build(case)
    learner = fb.attach(model, rule, example=x, **case.options)

    def loss_fn(out: Any) -> Tensor:
        return zoo.loss_of(case, out)

    assert fb.count_cost(learner, x, loss_fn=loss_fn).total == macs_of_a_step(learner, x, loss_fn)


@pytest.mark.parametrize(
    ("rule", "steps"), [("bp", 15), ("fa", 15), ("kp", 15), ("dfa", 1), ("drtp", 0), ("frozen", 0)]
)
def test_steps_of_vgg16(rule: str, steps: int) -> None:
    """16 layers: 15 products in sequence for backprop and chains."""
    with torch.device("meta"):
        model, x = nets.build("vgg16", (3, 32, 32), 10), torch.empty(2, 3, 32, 32)
    assert counted(fb.RULES[rule](), model, x).steps == steps


@EXAMPLES
def test_a_meta_model_costs_the_same(example: Example) -> None:
    """On the meta device nothing has values, and nothing is allocated."""
    there = copy.deepcopy(example.model).to("meta")
    assert counted(fb.DKP.published(), there, example.x.to("meta")) == counted(
        fb.DKP.published(), example.model, example.x
    )


@pytest.mark.parametrize("name", [name for name in fb.RULES if name != "dsp"])
def test_what_a_rule_unlocks_is_counted(name: str) -> None:
    """Products in sequence from the output's error to the last signal, on a plain net of five layers."""
    rule, sizes = fb.RULES[name](), (6, 9, 8, 7, 6, 3)
    model = nn.Sequential()
    for a, b in itertools.pairwise(sizes):
        model.extend([nn.Linear(a, b), nn.Tanh()])
    steps = counted(rule, model[:-1], torch.randn(4, 6)).steps
    said = {"": len(sizes) - 2, "backward": 1, "update": 0, "forward": 0}[rule.unlocked]
    # without maps they are direct feedback
    assert steps == (1 if name in ("cdfa", "han2020") else said)


@pytest.mark.parametrize(
    "rule", [fb.FA(), fb.DFA(), fb.rules.RelayedKP()], ids=lambda rule: rule.name
)
def test_the_forward_pass_costs_what_it_costs_in_backprop(rule: fb.Rule) -> None:
    """Also for a model on the meta device, whose rows nothing has shown: only its passes count."""
    with torch.device("meta"):
        model = nets.build("vgg6", (3, 32, 32), 10)
        x = torch.empty(4, 3, 32, 32)
    forwards = []
    for each in (fb.BP(), rule):
        learner = fb.attach(model, each, example=x)
        forwards.append(fb.count_cost(learner, x).forward)
        learner.detach()
    assert forwards[0] == forwards[1]
