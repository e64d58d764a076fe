"""Laws x rules x nets: what must hold for every rule of `RULES`, by its defaults, on every kind of net; or a clear refusal."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import pytest
import torch
import zoo
from steps import give_gradients, staleness, train
from torch import Tensor, nn
from torch.nn import functional as F

import feedbackward as fb

N, CLASSES = 5, 3


@dataclass(frozen=True)
class Case:
    """A net with class scores. `silent`: parameters whose gradient is zero in theory, whatever the signal."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    silent: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name

    def model(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return self.build()

    def batch(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(N, *self.shape, generator=generator)
        tokens = self.shape[:1] if self.name == "tokens" else ()
        return x, torch.randint(CLASSES, (N, *tokens), generator=generator)


def volume() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 4, 2, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)
    )  # fmt: skip


def plain() -> nn.Module:
    """Nothing but an activation between two layers."""
    return nn.Sequential(
        nn.Linear(6, 9),
        nn.Tanh(),
        nn.Linear(9, 8),
        nn.Tanh(),
        nn.Linear(8, 7),
        nn.Tanh(),
        nn.Linear(7, 3),
    )


CASES = (
    Case("plain", plain, (6,)),
    Case("mlp", zoo.mlp, (6,), ("2.bias",)),
    Case("convolutions", zoo.convolutions, (2, 8, 8)),
    Case("resnet", zoo.blocks.resnet, (2, 8, 8), ("stem.0.bias",)),
    Case("group_norms", zoo.group_norms, (2, 8, 8)),
    Case("tokens", zoo.tokens, (4, 6)),
    Case("volume", volume, (1, 4, 4, 4)),
)
every_rule = pytest.mark.parametrize("name", fb.RULES)


def loss(output: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(output.float().flatten(0, -2), y.flatten())


def attach(name: str, case: Case, seed: int = 0) -> fb.Learner:
    """The learner; a test ends here, well, where the net is refused by a sentence that names the cause."""
    rule, model = fb.RULES[name](), case.model(seed)
    random = torch.get_rng_state()
    try:
        learner = fb.attach(model, rule, example=case.batch()[0], seed=seed)
    except fb.FeedbackError as error:
        refused(str(error), rule, model)
    assert torch.equal(torch.get_rng_state(), random)
    staleness(learner)
    return learner


def refused(message: str, rule: fb.Rule, model: nn.Module) -> NoReturn:
    """Skip, if the message names the rule or a module, and says what to do."""
    named = {
        f"'{part}'"
        for name, _ in model.named_modules()
        for part in (name, f"{name}.input", f"{name}.weight")
    }
    assert rule.label in message or any(part in message for part in named), message
    assert len(re.findall(r"[.:;] ", message + " ")) > 1, f"no cause and no fix: {message}"
    pytest.skip(f"refused: {message}")


def trained(learner: fb.Learner) -> set[str]:
    """The parameters that the plan and the rule's graph say are trained: those of the head and of every segment with a signal.

    A rule that revises gradients may train the other segments too.
    """
    graph, plan = learner.graph, learner.plan
    ends = {end.site for end in (*graph.edges, *graph.local)} | {
        upward_edge.above for upward_edge in graph.upward
    }
    parts = [
        s
        for site, s in zip(graph.sites, plan.segments, strict=True)
        if site in ends or learner.rule.revises
    ]
    return {name for segment in (*parts, plan.head) for name in segment.parameters}


@every_rule
@pytest.mark.parametrize("case", CASES, ids=str)
def test_laws(case: Case, name: str) -> None:
    learner = attach(name, case)
    x, y = case.batch()
    assert learner.plan.unreached == ()
    check_forward(learner, case)
    check_gradients(learner, case)
    check_round_trip(learner, name, case)
    check_autocast(learner, x, y)
    check_probe(learner, x, y)


def check_forward(learner: fb.Learner, case: Case) -> None:
    """Outputs, buffers and random state are those of the plain model, bit by bit."""
    twin, (x, y) = case.model(), case.batch()
    torch.manual_seed(7)
    expected, random = twin(x), torch.get_rng_state()
    torch.manual_seed(7)
    if learner.attached.needs_target:
        learner.target(y)
    assert torch.equal(learner(x), expected)
    assert torch.equal(torch.get_rng_state(), random)
    for a, b in zip(learner.model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def check_gradients(learner: fb.Learner, case: Case) -> None:
    """After one optimizer step: finite everywhere, not zero in what is trained, none in what is not."""
    found = train(learner, *case.batch(), loss, steps=2)
    expected = trained(learner)
    for name, gradient in found.items():
        if name not in expected:
            assert gradient is None or not gradient.any(), (
                f"{name}: a gradient that nothing explains"
            )
            continue
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        if name not in case.silent:
            assert gradient.abs().max() > 1e-9, f"{name} is not trained"
    for name, B in learner.feedback.named_parameters():
        assert B.grad is not None, f"learned feedback {name} without a gradient"
        assert B.grad.isfinite().all(), name


def check_round_trip(learner: fb.Learner, name: str, case: Case) -> None:
    """Another net, attached with another seed, goes on as this one does once it has its state."""
    seeded = any(
        isinstance(edge.operator, fb.operators.Seeded) for edge in learner.graph.edges
    )  # its feedback is no state
    other = attach(name, case, seed=0 if seeded else 5)
    other.load_state_dict(learner.state_dict())
    steps = []
    for each in (learner, other):
        torch.manual_seed(3)
        each.zero_grad()
        give_gradients(each, *case.batch(), loss)
        steps.append({n: p.grad for n, p in each.named_parameters()})
    for key, gradient in steps[0].items():
        assert (gradient is None) == (steps[1][key] is None), key
        assert gradient is None or torch.equal(gradient, steps[1][key]), key


def check_autocast(learner: fb.Learner, x: Tensor, y: Tensor) -> None:
    learner.zero_grad()
    try:
        with torch.autocast("cpu", torch.bfloat16):
            output = give_gradients(learner, x, y, loss)
    except fb.FeedbackError as error:
        refused(str(error), learner.rule, learner.model)
    assert output.isfinite().all()
    for name, p in learner.named_parameters():
        assert p.grad is None or (p.grad.isfinite().all() and p.grad.dtype == p.dtype), name


def check_probe(learner: fb.Learner, x: Tensor, y: Tensor) -> None:
    """It can be measured, and the last layer has its true gradient."""
    if learner.attached.needs_target:
        learner.target(y)
    found = fb.probe(learner, lambda output: loss(output, y), x)
    assert found.parameters[list(found.parameters)[-1]].cosine > 1 - 1e-6


@every_rule
def test_every_rule_takes_some_net_of_layers_and_activations(name: str) -> None:
    attach(name, CASES[0])
