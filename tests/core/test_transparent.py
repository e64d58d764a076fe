"""A learner looks like its model, and neither a copy nor a file of the model carries the feedback."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import feedbackward as fb

X = torch.randn(5, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.act, self.head = nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)
        self.config = {"width": 8}

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.head(self.act(self.one(pixels)))

    def training_step(self, x: Tensor, factor: float = 1.0) -> Tensor:
        return factor * self(x).square().sum()

    def plan(self) -> str:
        return "the model's"

    @property
    def broken(self) -> int:
        return self.no_such_thing


def by_hand(learner: fb.Learner) -> list[Tensor | None]:
    learner.zero_grad()
    learner(X).square().sum().backward()
    return [None if p.grad is None else p.grad.clone() for p in learner.parameters()]


def same(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_signature_is_the_models() -> None:
    learner = fb.attach(Net(), fb.DFA(), example=X)
    assert inspect.signature(learner.forward) == inspect.signature(Net().forward)
    assert list(inspect.signature(learner.forward).parameters) == ["pixels", "labels"]
    assert "SiteError" in inspect.getdoc(learner.forward)
    assert torch.equal(learner.forward(X), learner(X))


def test_what_a_learner_lacks_is_the_models() -> None:
    learner = fb.attach(Net(), fb.DFA(), example=X)
    assert learner.config is learner.model.config
    assert learner.head is learner.model.head
    # a name of the learner's own stays so
    assert learner.plan.segments
    with pytest.raises(AttributeError, match="nothing"):
        _ = learner.nothing
    with pytest.raises(AttributeError):
        _ = learner.broken
    assert not hasattr(learner, "__len__")


def test_an_error_in_a_learners_own_attribute_is_not_hidden() -> None:
    learner = fb.attach(Net(), fb.DFA(), example=X)
    del learner.attached.whole_plan
    with pytest.raises(AttributeError):
        _ = learner.plan


@pytest.mark.parametrize("rule", [fb.DFA(), fb.KolenPollack.published()], ids=lambda r: r.name)
def test_a_method_of_the_model_trains_by_the_rule(rule: fb.Rule) -> None:
    learner = fb.attach(Net(), rule, example=X)
    expected = by_hand(learner)
    learner.zero_grad()
    learner.training_step(X, factor=1.0).backward()
    same([p.grad for p in learner.parameters()], expected)
    assert list(inspect.signature(learner.training_step).parameters) == ["x", "factor"]
    # the model itself stays plain
    learner.zero_grad()
    learner.model.training_step(X).backward()
    truth = learner.model.one.weight.grad
    assert not torch.allclose(truth, expected[0])


@pytest.mark.parametrize("in_place", [False, True])
def test_a_copy_of_the_model_is_plain(in_place: bool) -> None:
    learner = fb.attach(Net(), fb.DFA(), example=X, in_place=in_place)
    twin = copy.deepcopy(learner.model)
    plain = Net()
    expected = torch.autograd.grad(plain(X).square().sum(), list(plain.parameters()))
    found = torch.autograd.grad(twin(X).square().sum(), list(twin.parameters()))
    same(list(found), list(expected))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "inside"])
def test_a_copy_of_the_learner_trains_by_itself(way: str, in_place: bool) -> None:
    learner = fb.attach(Net(), fb.DKP.published(), example=X, in_place=in_place)
    if way == "deepcopy":
        twin = copy.deepcopy(learner)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(learner))
    else:
        # the model is copied before its learner
        holder = nn.ModuleDict({"a": learner.model, "b": learner})
        holder = copy.deepcopy(holder)
        twin = holder["b"]
        assert holder["a"] is twin.model
    expected = by_hand(learner)
    same(by_hand(twin), expected)
    if in_place:
        twin.zero_grad()
        twin.model(X).square().sum().backward()
        same([p.grad for p in twin.parameters()], expected)
    twin.detach()
    assert not twin.model.act._forward_hooks
    same(by_hand(learner), expected)


def test_a_file_of_the_model_needs_no_feedbackward(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 30))
    size = _size(model)
    fb.attach(model, fb.KolenPollack.published(), example=X, in_place=True)
    assert _size(model) < size + 2000
    torch.save(model, tmp_path / "model.pt")
    code = (
        "import sys, torch\n"
        f"model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "model(torch.ones(2, 4)).sum().backward()\n"
        "assert 'feedbackward' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def _size(model: nn.Module) -> int:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return buffer.tell()


def test_a_long_table_is_cut() -> None:
    """A transformer at its layers has a note for nearly every parameter."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    model = nn.Sequential(
        nn.Linear(4, 8), nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
    )
    model.append(nn.Linear(8, 3))
    learner = fb.attach(model, fb.DFA(), example=torch.randn(3, 5, 4))
    assert len(learner.plan.shared) > 20
    lines = str(learner).splitlines()
    assert max(map(len, lines)) <= 140
    assert sum("in several segments" in line for line in lines) <= 6
    assert f"{len(learner.plan.shared) - 5} more" in lines[-1]
