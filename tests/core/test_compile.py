"""`torch.compile` of a whole learner: one graph per form of a pass, and the gradients of the plain one."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
import zoo
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import feedbackward as fb

RULES = [fb.DFA(), fb.DKP.published(), fb.DKP.published(center=True)]
slow = pytest.mark.slow


def check(name: str, rule: fb.Rule, backend: str, rtol: float) -> None:
    """Two steps, a smaller batch and an evaluation of the compiled learner beside the plain one."""
    torch._dynamo.reset()
    case = zoo.case(name)
    model, example = zoo.build(case)
    plain = fb.attach(model, rule, example=example, **case.options)
    learner = copy.deepcopy(plain)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(learner, fullgraph=True, backend=counter)
    for size in (5, 5, 3, 2):
        for call in (plain, compiled):
            torch.manual_seed(1)
            zoo.loss_of(case, call(example[:size])).backward()
    compare(plain, learner, rtol, case.silent)
    plain.eval()
    learner.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(example), plain(example), rtol=rtol, atol=rtol)
    assert counter.frame_count <= 3, (
        "one graph for training, one for other batch sizes, one for evaluation"
    )


def compare(plain: fb.Learner, learner: fb.Learner, rtol: float, silent: tuple[str, ...]) -> None:
    other: dict[str, Any] = dict(learner.named_parameters())
    for key, p in plain.named_parameters():
        scale = (
            1e-3 if key.removeprefix("model.") not in silent else 1.0
        )  # a gradient of zero, rounded
        atol = rtol * (p.grad.abs().max().item() + scale)
        torch.testing.assert_close(other[key].grad, p.grad, rtol=rtol, atol=atol, msg=key)
    for key, buffer in plain.named_buffers():
        torch.testing.assert_close(dict(learner.named_buffers())[key], buffer, rtol=rtol, atol=rtol)


@pytest.mark.single
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("name", ["in_place", "resnet_functional"])
def test_whole_learner(name: str, rule: fb.Rule) -> None:
    check(name, rule, "eager", 0)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("part", ["", "2"])
@pytest.mark.parametrize("rule", [fb.DKP(), fb.KolenPollack()], ids=str)
def test_compiled_in_place(rule: fb.Rule, part: str, when: str) -> None:
    """A model or a part of it may be compiled in place, before it is attached to or after."""
    torch._dynamo.reset()
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.arange(8) % 3
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(7, 7), nn.BatchNorm1d(7), nn.ReLU())
        model = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), block, nn.Linear(7, 3)).double()
        if compiled and when == "before":
            model.get_submodule(part).compile(backend="eager")
        learner = fb.attach(model, rule, example=x)
        if compiled and when == "after":
            model.get_submodule(part).compile(backend="eager")
        for _ in range(2):
            nn.functional.cross_entropy(learner(x), y).backward()
        if compiled:
            assert model.get_submodule(part)._compiled_call_impl is not None
        found.append([p.grad for p in learner.parameters()])
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.nightly
@slow
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("name", ["in_place", "resnet_functional"])
def test_ahead_of_time_backward(name: str, rule: fb.Rule) -> None:
    check(name, rule, "aot_eager", 1e-6)


@pytest.mark.nightly
@slow
@pytest.mark.parametrize("name", ["in_place", "resnet_functional"])
def test_inductor(name: str) -> None:
    check(name, fb.DKP.published(center=True), "inductor", 1e-4)


def test_an_import_leaves_the_compiler_alone() -> None:
    """`torch._dynamo` takes longer to import than the library itself, and only a compiled learner needs it."""
    code = "import sys, torch\nbefore = set(sys.modules)\nimport feedbackward\n"
    code += "print('torch._dynamo' in set(sys.modules) - before)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False"]
