"""Mixtures: each part is its rule's, a mixture of one rule is that rule, and what does not go together is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import oracles
import pytest
import torch
from pairs import CONV, MLP, TOKENS, Pair, assert_close, exact_grads, grads, loss_fn, signals
from rows import ROWS, Equations
from torch import Tensor, nn
from zoo import build, case

import feedbackward as fb
from feedbackward.engine.phase import Phase

NAMES = {row.name: row for row in ROWS}


def step(learner: fb.Learner, x: Tensor, y: Tensor) -> dict[str, Tensor | None]:
    if learner.attached.needs_target:
        learner.target(y)
    loss_fn(y)(learner(x)).backward()
    return grads(learner)


@pytest.mark.parametrize("pair", [MLP, CONV, TOKENS], ids=str)
@pytest.mark.parametrize(
    "rule",
    [
        fb.BP(),
        fb.Frozen(),
        fb.DFA(),
        fb.DKP.published(center=True),
        fb.DRTP(),
        fb.DGL(),
        fb.FA(),
        fb.KolenPollack(),
    ],
    ids=lambda r: r.name,
)
def test_one_rule_everywhere_is_that_rule(rule: fb.Rule, pair: Pair) -> None:
    x, y = pair.batch()
    mixture = fb.Mixed({"*": rule})
    assert (mixture.label, mixture.transport, mixture.feeds) == (
        rule.label,
        rule.transport,
        rule.feeds,
    )
    expected, got = (step(pair.attach(r), x, y) for r in (rule, mixture))
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        assert_close(gradient, expected[name], name, tolerance=0.0)


@pytest.mark.parametrize("pair", [CONV, MLP, TOKENS], ids=str)
@pytest.mark.parametrize(
    ("lower", "upper"),
    [
        ("dfa", "dkp"),
        ("frozen", "dkp-centred"),
        ("bp", "dfa"),
        ("dkp", "frozen"),
        ("dkp-centred", "bp"),
    ],
)
def test_each_site_gets_its_own_rules_signal(pair: Pair, lower: str, upper: str) -> None:
    """The last site by one rule, the others by another, against the oracle's layers."""
    model = pair.model()
    x, y = pair.batch()
    last = pair.cuts[-1]
    learner = pair.attach(fb.Mixed({last: NAMES[upper].rule, "*": NAMES[lower].rule}), model)
    arrays = {e.site.name: learner.feedback_of(e).detach().numpy() for e in learner.graph.edges}
    equations = Equations({site: NAMES[upper if site == last else lower] for site in pair.cuts})
    expected = oracles.step(pair.mirror(model), x.numpy(), y.numpy(), equations, arrays)
    got = signals(learner, x, y)
    for site in pair.cuts:
        assert_close(got.get(site), expected.signals[site], site)
    for name, gradient in grads(model).items():
        assert_close(gradient, expected.parameters[name], name)
    for edge in learner.graph.edges:
        B = learner.feedback_of(edge)
        assert isinstance(B, nn.Parameter) == (edge.site.name in equations.learned)
        assert_close(B.grad, equations.learned.get(edge.site.name), edge.key)


def test_targets_and_errors_in_one_network() -> None:
    """The lower part by local losses, the upper part by learned feedback: each as if it were alone."""
    x, y = CONV.batch()
    mixture = fb.Mixed({"pool1": fb.DGL(hidden=4), "*": fb.DKP.published()})
    alone = step(CONV.attach(fb.DGL(hidden=4)), x, y), step(CONV.attach(fb.DKP.published()), x, y)
    learner = CONV.attach(mixture)
    assert (learner.attached.needs_target, learner.attached.needs_error) == (True, True)
    for name, gradient in step(learner, x, y).items():
        local = name.startswith(("model.conv1", "model.bn1", "feedback.pool1"))
        assert_close(gradient, alone[0 if local else 1][name], name)
    with pytest.raises(fb.AttachError, match="known after the forward pass only"):
        learner.backward(x, loss_fn(y), schedule="eager")
    with pytest.raises(fb.FeedbackError, match="call `learner"):
        learner(x)


def test_schedules_of_a_mixture() -> None:
    """Replay gives what joint gives, with targets and errors at once; eager where no part needs an error."""
    for rules, schedule in (
        ({"pool1": fb.DGL(hidden=4), "flat": fb.DRTP(), "*": fb.DKP.published()}, "replay"),
        ({"pool1": fb.DGL(hidden=4), "flat": fb.BP(), "*": fb.DRTP()}, "eager"),
    ):
        found = []
        for run in ("joint", schedule):
            x, y = CONV.batch()
            learner = CONV.attach(fb.Mixed(rules))
            learner.target(y)
            learner.backward(x, loss_fn(y), schedule=run)
            found.append(grads(learner))
        for name, gradient in found[0].items():
            assert_close(found[1][name], gradient, name, tolerance=1e-12)


def test_chains_with_backprop() -> None:
    """Feedback of the layers' own shapes in the classifier, backprop in the convolutions: with B = W it is backprop."""
    model, (x, y) = CONV.model(), CONV.batch()
    truth = exact_grads(model, x, y)
    learner = CONV.attach(fb.Mixed({"conv*": fb.BP(), "*": fb.KolenPollack()}), model)
    assert [edge.site.weight for edge in learner.graph.edges] == ["fc1.weight", "head.weight"]
    with torch.no_grad():
        for edge in learner.graph.edges:
            learner.feedback_of(edge).copy_(model.get_parameter(edge.site.weight))
    for name, gradient in step(learner, x, y).items():
        name = (
            name.removeprefix("model.")
            .replace("feedback.", "")
            .replace(".input", "")
            .replace("/input", ".weight")
        )
        assert_close(gradient, truth[name], name)


def test_a_pattern_may_be_a_module_or_a_predicate() -> None:
    model, example = build(case("plain"))
    maps = {lambda site: len(site.shape) == 3: fb.BP(), "fc1": fb.DFA(), "*": fb.Frozen()}
    learner = fb.attach(model, fb.Mixed(maps), example=example)
    assert [site.name for site in learner.graph.sites] == ["fc1.input", "fc2.input"]
    assert [edge.site.name for edge in learner.graph.edges] == ["fc1.input"]
    assert isinstance(learner.rule.rules["fc1"], fb.DFA)


def test_what_it_needs_and_costs() -> None:
    mixture = fb.Mixed({"features.*": fb.BP(), "classifier.*": fb.DRTP()})
    assert mixture.label == "BP + DRTP"
    assert mixture.transport is True
    assert not fb.Mixed({"a": fb.DFA(), "b": fb.Frozen()}).transport
    assert fb.Mixed({"a": fb.FA(), "b": fb.rules.USF()}).transport == "signs"
    assert fb.Mixed({"a": fb.BP(), "b": fb.rules.USF()}).transport is True


def test_every_edge_carries_its_own_rule() -> None:
    """What the engine asks, it asks the edges; of the whole network the rules that are there."""
    rules = {"pool1": fb.DGL(hidden=4), "flat": fb.DRTP(), "*": fb.DKP.published(center=True)}
    attached = CONV.attach(fb.Mixed(rules)).attached
    assert [edge.rule for edge in attached.graph.edges] == [rules["flat"], rules["*"]]
    assert [local.rule for local in attached.graph.local] == [rules["pool1"]]
    assert set(attached.rules) == set(rules.values())
    assert (attached.needs_target, attached.needs_error) == (True, True)
    assert attached.in_phase == ()
    flipped = CONV.attach(fb.rules.Flipped(fb.DFA())).attached
    assert {(edge.rule, edge.factor) for edge in flipped.graph.edges} == {(fb.DFA(), -1.0)}


@dataclass(frozen=True)
class Phased(fb.DKP):
    """Learns in a phase: the gradient says which edges it was asked for."""

    value: float = 1.0
    in_phase = True

    def feedback_step(self, phase: Phase) -> None:
        met: list[str] = []
        phase.forward(change=lambda site, h: met.append(site.name) or h)
        assert met == [edge.site.name for edge in phase.edges]
        for edge in phase.edges:
            phase.give(edge, (torch.full_like(phase.weights(edge)[0], self.value),))


def test_phases_are_each_rules_own() -> None:
    x, y = CONV.batch()
    rules = {"pool1": Phased(value=2.0), "flat": fb.DKP.published(), "act3": Phased(value=3.0)}
    learner = CONV.attach(fb.Mixed(rules))
    loss_fn(y)(learner(x)).backward()
    assert [name for name, B in learner.feedback.named_parameters() if B.grad is not None] == [
        "flat"
    ]
    learner.feedback_step(x)
    found = {name: B.grad for name, B in learner.feedback.named_parameters()}
    assert (found["pool1"] == 2).all()
    assert (found["act3"] == 3).all()
    assert_close(found["flat"], step(CONV.attach(fb.DKP.published()), x, y)["feedback.flat"])


@dataclass(frozen=True)
class Common(fb.Dense):
    common = True


class Residual(nn.Module):
    """One skip path."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.branch = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(h + self.branch(h))


REFUSED: Sequence[tuple[Callable[[], object], str]] = (
    (lambda: fb.Mixed({}), "at least one pattern"),
    (lambda: fb.Mixed({"a": fb.DFA}), "the rule for 'a' must be an instance of a Rule"),  # type: ignore[dict-item]
    (lambda: fb.Mixed({"a": fb.Mixed({"b": fb.DFA()})}), "not Mixed itself"),
    (
        lambda: fb.Mixed({"a": fb.DFA(), "b": fb.rules.DSP()}),
        "DSP is a schedule of the whole network",
    ),
    (
        lambda: fb.Mixed({"a": fb.DFA(), "b": fb.FA()}),
        "DFA and FA cannot be mixed: one feeds activities",
    ),
    (
        lambda: fb.attach(
            Residual(), fb.Mixed({"*": fb.rules.HighwayKP()}), example=torch.randn(4, 3)
        ),
        "Highway KP follows the skip paths of the whole network",
    ),
    (lambda: fb.Mixed({"a": fb.Frozen(), "b": fb.FA()}), "Frozen and FA cannot be mixed"),
    (
        lambda: CONV.attach(fb.Mixed({"pool1": fb.DFA()})),
        "no pattern fits the site 'flat'. Add one, or \"\\*\"",
    ),
    (
        lambda: CONV.attach(fb.Mixed({"*": fb.DFA(), "fc": fb.DKP.published()})),
        "no site is left for 'fc'. The sites are pool1, flat, act3",
    ),
    (
        lambda: CONV.attach(fb.Mixed({"*": fb.DFA(), len: fb.DKP.published()})),
        "no site is left for len",
    ),
    (
        lambda: CONV.attach(
            fb.Mixed({"pool1": fb.DFA(operator=Common()), "*": fb.DKP.published(operator=Common())})
        ),
        "DKP and DFA would use the same feedback weights",
    ),
)


@pytest.mark.parametrize(("make", "sentence"), REFUSED, ids=[sentence for _, sentence in REFUSED])
def test_what_does_not_go_together_is_refused(make: Callable[[], object], sentence: str) -> None:
    with pytest.raises(fb.AttachError, match=sentence):
        make()
