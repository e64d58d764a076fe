"""The program's default device and dtype, and the names of a model's modules, change no feedback."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import feedbackward as fb

RULES = {
    rule.label: rule
    for rule in (
        fb.DFA(), fb.DKP(), fb.rules.FA(init="xavier_uniform"), fb.rules.DGL(), fb.rules.FDFA(), fb.rules.BinaryDFA(),
        fb.rules.KolenPollack.published(), fb.DFA(operator=fb.operators.LowRank(2)),
    )
}  # fmt: skip
OPERATORS = (
    fb.Dense(), fb.Dense("scaled_normal"), fb.operators.Sparse(1), fb.operators.LowRank(2),
    fb.operators.Seeded(), fb.operators.Seeded(distribution="binary"), fb.operators.Binary(),
)  # fmt: skip


@pytest.fixture
def ambient() -> Iterator[None]:
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
    torch.set_default_device(None)


def model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    return net.double()


def grads(net: nn.Module, learner: fb.Learner) -> list[Tensor]:
    x = torch.linspace(-1, 1, 20, dtype=torch.float64, device="cpu").reshape(5, 4)
    y = torch.tensor([0, 1, 2, 0, 1], device="cpu")
    if learner.attached.needs_target:
        learner.target(y)
    F.cross_entropy(learner(x), y).backward()
    return [p.grad for p in net.parameters() if p.grad is not None]


EXAMPLE = torch.ones(5, 4, dtype=torch.float64)


@pytest.mark.parametrize("label", RULES)
@pytest.mark.parametrize("default", ["meta", torch.float64, torch.float16])
def test_defaults_change_nothing(ambient: None, label: str, default: str | torch.dtype) -> None:
    plain, there = model(), model()
    expected = grads(plain, fb.attach(plain, RULES[label], example=EXAMPLE))
    if isinstance(default, torch.dtype):
        torch.set_default_dtype(default)
        assert torch.get_default_dtype() == default
    else:
        torch.set_default_device(default)
    learner = fb.attach(there, RULES[label], example=EXAMPLE)
    assert all(t.device.type == "cpu" for t in learner.state_dict().values())
    torch.set_default_device(None)
    for one, two in zip(expected, grads(there, learner), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("operator", OPERATORS, ids=repr)
def test_operators_under_a_default_dtype(ambient: None, operator: fb.operators.Operator) -> None:
    plain, there = model(), model()
    expected = grads(plain, fb.attach(plain, fb.DFA(operator=operator), example=EXAMPLE))
    torch.set_default_dtype(torch.float64)
    found = grads(there, fb.attach(there, fb.DFA(operator=operator), example=EXAMPLE))
    for one, two in zip(expected, found, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("label", RULES)
def test_feedback_of_a_model_attached_on_meta_is_drawn_when_it_gets_memory(label: str) -> None:
    """The same as of a model that was on the CPU; what is loaded afterwards stays."""
    expected = fb.attach(model(), RULES[label], example=EXAMPLE).feedback.state_dict()
    late = fb.attach(model().to("meta"), RULES[label], example=EXAMPLE.to("meta"))
    late.to_empty(device="cpu")
    found = late.feedback.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    other = {key: value + 1 for key, value in expected.items()}
    late.feedback.load_state_dict(other)
    copied = copy.deepcopy(late).to("cpu").feedback.state_dict()
    assert all(torch.equal(copied[key], value) for key, value in other.items())


@pytest.mark.parametrize("label", RULES)
def test_feedback_is_never_what_is_in_memory(label: str) -> None:
    there = model()
    learner = fb.attach(there, RULES[label], example=EXAMPLE)
    before = {name: t.clone() for name, t in learner.feedback.state_dict().items()}
    learner.to_empty(device="cpu")
    assert all(torch.equal(t, before[name]) for name, t in learner.feedback.state_dict().items())
    with torch.device("meta"):
        empty = model()
    learner = fb.attach(empty, RULES[label], example=EXAMPLE.to("meta"))
    empty.to_empty(device="cpu")
    empty.load_state_dict(model().state_dict())
    if learner.feedback_bytes:
        with pytest.raises(fb.FeedbackError, match=r"on the meta device.*feedback\.to_empty"):
            grads(empty, learner)
        learner.feedback.to_empty(device="cpu")
    expected = grads(there := model(), fb.attach(there, RULES[label], example=EXAMPLE))
    for one, two in zip(expected, grads(empty, learner), strict=True):
        assert torch.equal(one, two)


def test_mirrored_feedback_of_a_model_without_values_is_refused() -> None:
    rule = fb.rules.FA(init="mirrored")
    learner = fb.attach(model().to("meta"), rule, example=EXAMPLE.to("meta"))
    with pytest.raises(fb.FeedbackError, match="meta device"):
        learner.to_empty(device="cpu")


def test_mirrored_feedback_that_cannot_be_drawn_again_is_not_lost() -> None:
    learner = fb.attach(model(), fb.KolenPollack(), example=EXAMPLE)
    before = {name: t.clone() for name, t in learner.state_dict().items()}
    for part in (learner, learner.feedback):
        with pytest.raises(fb.FeedbackError, match=r"Attach after the weights are there"):
            part.to_empty(device="cpu")
    assert all(torch.equal(t, before[name]) for name, t in learner.state_dict().items())


NAMES = [
    "output",
    "head",
    "input",
    "source",
    "feedback",
    "a/b",
    "a:bias",
    "a%2Fb",
    "the whole",
    "B",
]


class Named(nn.Module):
    """A layer of a given name, and a function after the last layer."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        for part, layer in (
            ("first", nn.Linear(4, 6)),
            (name, nn.Linear(6, 6)),
            ("last", nn.Linear(6, 3)),
        ):
            self.add_module(part, layer)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.get_submodule("first")(x).tanh()
        return F.log_softmax(self.get_submodule("last")(self.get_submodule(self.name)(hidden)), 1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "rule", [fb.DFA(), fb.DKP(), fb.rules.DTP(), fb.rules.DDTP(), fb.rules.DGL()], ids=str
)
def test_any_name_of_a_module(name: str, rule: fb.Rule) -> None:
    """Which parameters get a gradient does not depend on the name."""
    reached = []
    for chosen in ("middle", name):
        torch.manual_seed(0)
        net = Named(chosen).double()
        learner = fb.attach(net, rule, example=EXAMPLE, sites=["first", chosen])
        grads(net, learner)
        reached.append([p.grad is not None for p in net.parameters()])
    assert reached[0] == reached[1]


def test_names_that_differ_in_a_slash_only() -> None:
    """`a.b` and `a/b` are two modules, with feedback of their own."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Module()
            self.a.b = nn.Linear(4, 6)
            self.add_module("a/b", nn.Linear(6, 6))
            self.last = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.get_submodule("a/b")(self.a.b(x).relu()).relu())

    learner = fb.attach(Net(), fb.DFA(), example=torch.ones(5, 4), sites=["a.b", "a/b"])
    one, two = (learner.feedback_of(edge) for edge in learner.graph.edges)
    assert not torch.equal(one, two)
