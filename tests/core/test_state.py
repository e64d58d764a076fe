"""Nothing of an earlier pass is used later, and nothing of the user's is left changed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import feedbackward as fb

F64 = torch.float64


def net(width: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, 3)).to(F64)


X = torch.randn(5, 6, dtype=F64, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1])


def loss(output: Tensor) -> Tensor:
    return F.cross_entropy(output, Y)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[n], b[n], atol=1e-12) for n in a)


def doubled(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return 2 * forward(x)


@pytest.mark.parametrize("fails", [False, True])
def test_a_forward_of_the_instance_survives_replay(fails: bool) -> None:
    """Checkpointing and offloading tools put a `forward` of their own into the instance."""
    model = net()
    patched = [model[0], model[2], model[4]]
    for module in patched:
        module.forward = functools.partial(doubled, module.forward)  # type: ignore[method-assign]
    own = [vars(module)["forward"] for module in patched]
    joint = fb.attach(copy.deepcopy(model), fb.DFA(), example=X)
    joint.backward(X, loss)
    learner = fb.attach(model, fb.DFA(), example=X)

    def broken(output: Tensor) -> Tensor:
        raise RuntimeError("the loss broke")

    if fails:
        with pytest.raises(RuntimeError, match="the loss broke"):
            learner.backward(X, broken, "replay", keep_inputs=True)
    for _ in range(2):  # the second step would miss what the first one dropped
        learner.zero_grad()
        learner.backward(X, loss, "replay", keep_inputs=True)
        assert [vars(module).get("forward") for module in patched] == own
        assert same(gradients(learner), gradients(joint))
    assert not any("forward" in vars(m) for m in model.modules() if m not in patched)


def passes(learner: fb.Learner) -> Iterator[Callable[[], object]]:
    def evaluation() -> None:
        with torch.no_grad():
            learner(X)

    def exact() -> None:
        with learner.exact():
            learner(X)

    yield evaluation
    yield exact


@pytest.mark.parametrize("which", [0, 1])
def test_targets_do_not_outlive_the_next_pass(which: int) -> None:
    learner = fb.attach(net(), fb.DRTP(), example=X)
    learner.target(Y)
    list(passes(learner))[which]()
    with pytest.raises(fb.FeedbackError, match="needs the targets before the forward pass"):
        learner(X)


FREEZES = [("0.",), ("2.",), ("0.", "2."), ("4.", "6."), ()]


@pytest.mark.parametrize("keep_inputs", [False, True])
@pytest.mark.parametrize("first", FREEZES)
@pytest.mark.parametrize("then", FREEZES)
def test_replay_follows_what_is_frozen(
    first: tuple[str, ...], then: tuple[str, ...], keep_inputs: bool
) -> None:
    """Joint and replay agree, whatever was frozen at `attach` and at the first step."""

    def freeze(model: nn.Module, prefixes: tuple[str, ...]) -> None:
        for name, p in model.named_parameters():
            p.requires_grad_(not name.startswith(prefixes) if prefixes else True)

    found = []
    for schedule in ("joint", "replay"):
        model = net()
        freeze(model, first)
        learner = fb.attach(model, fb.DKP.published(), example=X)
        options = {"keep_inputs": keep_inputs} if schedule == "replay" else {}
        learner.backward(X, loss, schedule, **options)  # type: ignore[arg-type]
        freeze(model, then)
        learner.zero_grad()
        learner.backward(X, loss, schedule, **options)  # type: ignore[arg-type]
        found.append(gradients(learner))
        trained = {n for s in (*learner.plan.segments, learner.plan.head) for n in s.parameters}
        assert trained == {n for n, p in model.named_parameters() if p.requires_grad}
    assert same(*found)


def test_a_layer_that_thaws_is_as_late_as_its_part() -> None:
    """The gradient of a step arrives so many steps later, also of a layer that was frozen at first."""
    model = net()
    model[0].requires_grad_(False)
    learner = fb.attach(model, fb.DFA(), example=X)
    delayed = fb.Delayed(learner, 2)
    model[0].requires_grad_(True)
    arrived = []
    for _ in range(3):
        learner.zero_grad()
        loss(learner(X)).backward()
        delayed.exchange()
        arrived.append(model[0].weight.grad is not None)
    assert arrived == [False, False, True]
