"""Models whose output is an object: the plan is that of the same model with a dict, or the refusal names the class."""

from __future__ import annotations

import collections
import dataclasses
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import feedbackward as fb


@dataclasses.dataclass
class Plain:
    logits: Tensor
    hidden: Tensor


@dataclasses.dataclass(frozen=True)
class Frozen:
    logits: Tensor
    hidden: Tensor


@dataclasses.dataclass(slots=True)
class Slotted:
    logits: Tensor
    hidden: Tensor


@dataclasses.dataclass
class Nested:
    inner: Plain
    label: str = "x"


class Thing:
    def __init__(self, logits: Tensor, hidden: Tensor) -> None:
        self.logits, self.hidden = logits, hidden


class Slots:
    __slots__ = ("hidden", "logits")

    def __init__(self, logits: Tensor, hidden: Tensor) -> None:
        self.logits, self.hidden = logits, hidden


class Child(Slots):
    __slots__ = ("more",)


class Fields(dict[str, Any]):
    __getattr__ = dict.__getitem__


class Several(list[Tensor]):
    pass


class Callback(Thing):
    def __call__(self) -> Tensor:
        return self.logits


Pair = collections.namedtuple("Pair", "logits hidden")

# how a net wraps its tensors, and how to get the logits back
WRAPS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], Tensor]]] = {
    "dataclass": (Plain, lambda o: o.logits),
    "frozen dataclass": (Frozen, lambda o: o.logits),
    "dataclass with slots": (Slotted, lambda o: o.logits),
    "nested dataclass": (lambda z, h: Nested(Plain(z, h)), lambda o: o.inner.logits),
    "list of dataclasses": (lambda z, h: [Plain(z, h)], lambda o: o[0].logits),
    "dataclass in a dict": (lambda z, h: {"all": Plain(z, h)}, lambda o: o["all"].logits),
    "object": (Thing, lambda o: o.logits),
    "object with slots": (Slots, lambda o: o.logits),
    "object with inherited slots": (Child, lambda o: o.logits),
    "namespace": (lambda z, h: types.SimpleNamespace(logits=z, hidden=h), lambda o: o.logits),
    "object that holds a list": (lambda z, h: Thing([z, h], h), lambda o: o.logits[0]),
    "subclass of dict": (lambda z, h: Fields(logits=z, hidden=h), lambda o: o.logits),
    "user dict": (lambda z, h: collections.UserDict(logits=z, hidden=h), lambda o: o["logits"]),
    "subclass of list": (lambda z, h: Several([z, h]), lambda o: o[0]),
    "subclass of dict in a tuple": (lambda z, h: (Fields(z=z), [h]), lambda o: o[0].z),
    "object to call": (Callback, lambda o: o()),
    "named tuple": (Pair, lambda o: o.logits),
    "tuple": (lambda z, h: (z, h), lambda o: o[0]),
    "distribution": (lambda z, h: torch.distributions.Normal(z, 1.0), lambda o: o.loc),
}
PLAIN = ("named tuple", "tuple", "distribution", "subclass of dict in a tuple", "object to call")
OPAQUE = [name for name in WRAPS if name not in PLAIN and "subclass" not in name]
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self, wrap: Callable[[Tensor, Tensor], Any], function: bool = False) -> None:
        super().__init__()
        self.wrap, self.function = wrap, function
        self.body, self.head = nn.Sequential(nn.Linear(4, 6), nn.ReLU()), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        hidden = self.body(x)
        logits = self.head(hidden)
        return self.wrap(F.log_softmax(logits, 1) if self.function else logits, hidden)


def told(wrap: Callable[[Tensor, Tensor], Any], pick: Callable[[Any], Tensor]) -> tuple[Any, ...]:
    """The plan, what attach warned of, and the gradients in both schedules."""
    torch.manual_seed(0)
    model = Net(wrap)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        learner = fb.attach(model, fb.DFA(), example=X, output=pick)
    grads = []
    for schedule in ("joint", "replay"):
        model.zero_grad()
        learner.backward(X, lambda out: pick(out).square().mean(), schedule=schedule)
        grads += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    said = [str(w.message) for w in caught if "no segment trains" in str(w.message)]
    return learner.plan.head, learner.plan.unreached, said, [g.tolist() for g in grads]


@pytest.mark.parametrize("name", WRAPS)
def test_the_plan_and_gradients_are_those_of_a_dict(name: str) -> None:
    expected = told(lambda z, h: {"logits": z, "hidden": h}, lambda o: o["logits"])
    assert told(*WRAPS[name]) == expected


@pytest.mark.parametrize("name", OPAQUE)
def test_without_output_the_refusal_names_the_class(name: str) -> None:
    wrap, _ = WRAPS[name]
    kind = type(wrap(torch.zeros(5, 3), torch.zeros(5, 6))).__name__
    with pytest.raises(fb.FeedbackError, match=f"{kind}.*output="):
        fb.attach(Net(wrap), fb.DFA(), example=X)


@pytest.mark.parametrize("name", OPAQUE)
def test_a_tensor_that_no_module_makes_is_refused_with_the_class(name: str) -> None:
    wrap, pick = WRAPS[name]
    net = Net(wrap, function=True)
    kind = type(wrap(torch.zeros(5, 3), torch.zeros(5, 6))).__name__
    with pytest.raises(fb.FeedbackError, match=f"{kind}.*error_at"):
        fb.attach(net, fb.DFA(), example=X, output=pick)
    learner = fb.attach(net, fb.DFA(), example=X, error_at="head")
    pick(learner(X)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize(
    ("wrap", "pick"),
    [(lambda z, h: lambda: z, lambda o: o()), (lambda z, h: iter([z]), next)],
)
def test_an_output_that_hides_its_tensors_leaves_the_plan_true(wrap: Any, pick: Any) -> None:
    expected = told(lambda z, h: (z,), lambda o: o[0])
    assert told(wrap, pick) == expected
