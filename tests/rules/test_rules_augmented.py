"""Direct rules with another function for the activations' derivative, against loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracles
import pytest
import torch
from pairs import CONV, MLP, TOKENS, Pair, assert_close, grads, loss_fn, signals
from torch import Tensor, nn

import feedbackward as fb
from feedbackward.rules.direct.augmented import DERIVATIVES

# the same networks, split where the activations begin
PAIRS = (
    replace(MLP, cuts=("fc1", "fc2", "fc3")),
    replace(CONV, cuts=("bn1", "bn2", "fc1")),
    replace(TOKENS, cuts=("fc1", "fc2")),
)
G = {
    "one": lambda a: 1.0,
    "step": lambda a: float(a > 0),
    "leaky": lambda a: 1.0 if a > 0 else 0.1,
    "tanh": lambda a: 1 / np.cosh(a) ** 2,
    "sigmoid": lambda a: np.exp(-a) / (1 + np.exp(-a)) ** 2,
    "cos": np.cos,
}


class Equations:
    """delta a_m = (e_m B) * g(a_m), and for DKP grad B = e^T f(a). Asked from the last site down."""

    def __init__(self, pair: Pair, derivative: str, learned: bool) -> None:
        self.g = np.vectorize(G[derivative], otypes=[float])
        self.names = iter(reversed(pair.cuts))
        self.feedback = self.learned if learned else None

    def signal(self, known: oracles.Known) -> oracles.Array:
        return oracles.direct(known) * self.g(known.h)

    def learned(self, known: oracles.Known) -> oracles.Array:
        a = known.h
        h = np.tanh(a) if next(self.names) == "fc2" else np.maximum(a, 0)
        return oracles.outer_product(replace(known, h=h))


@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("kind", ["dfa", "dkp"])
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_step_equals_the_oracle(pair: Pair, kind: str, derivative: str) -> None:
    rule: fb.Rule = fb.DFA(derivative=derivative)
    if kind == "dkp":
        rule = fb.DKP.published(derivative=derivative)
    model = pair.model()
    x, y = pair.batch()
    learner = pair.attach(rule, model)
    assert tuple(site.name for site in learner.sites) == pair.cuts
    feedback = {e.site.name: learner.feedback_of(e).detach().numpy() for e in learner.graph.edges}
    equations = Equations(pair, derivative, rule.learned)
    expected = oracles.step(pair.mirror(model), x.numpy(), y.numpy(), equations, feedback)
    found = signals(learner, x, y)
    for name in pair.cuts:
        assert_close(found[name], expected.signals[name], name)
    for name, gradient in grads(model).items():
        assert_close(gradient, expected.parameters[name], name)
    for edge in learner.graph.edges:
        wanted = expected.feedback.get(edge.site.name)
        assert_close(learner.feedback_of(edge).grad, wanted, edge.site.name)


def test_the_activations_own_derivative_gives_the_plain_rule() -> None:
    """With ReLU everywhere, g = step is DFA, up to the names of the sites and so the seed of B."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    found: list[dict[str, Tensor]] = []
    weights: list[Tensor] = []
    for rule in (fb.DFA(), fb.DFA(derivative="step")):
        learner = fb.attach(model, rule, example=x)
        for edge, B in zip(learner.graph.edges, weights, strict=False):
            learner.feedback_of(edge).copy_(B)
        weights = [learner.feedback_of(edge).clone() for edge in learner.graph.edges]
        model.zero_grad()
        loss_fn(y)(learner(x)).backward()
        found.append({k: g.clone() for k, g in grads(model).items()})
        learner.detach()
    for name, gradient in found[0].items():
        assert_close(found[1][name], gradient, name)


def test_replay_gives_the_same_gradients() -> None:
    pair = PAIRS[1]
    x, y = pair.batch()
    found = []
    for schedule in ("joint", "replay"):
        learner = pair.attach(fb.DKP(derivative="tanh", operator=fb.Dense()))
        learner.backward(x, loss_fn(y), schedule=schedule)  # type: ignore[arg-type]
        found.append(grads(learner))
    for name, gradient in found[0].items():
        assert_close(found[1][name], gradient, name)


def test_activations_are_chosen_by_name_or_predicate() -> None:
    pair = PAIRS[1]
    for sites in (["act3"], "act3", lambda name, module: name == "act3"):
        learner = pair.attach(fb.DFA(derivative="one"), sites=sites)
        assert [site.name for site in learner.sites] == ["fc1"]


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu())


class Summed(nn.Module):
    """The input of an activation that no module makes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x) + 1))


def test_a_sum_before_an_activation_is_cut_at_its_input() -> None:
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    learner = fb.attach(Summed(), fb.DFA(derivative="one"), example=x)
    loss = loss_fn(y)(learner(x))
    (e,) = torch.autograd.grad(loss_fn(y)(out := learner.model(x)), out)
    loss.backward()
    signal = e @ learner.feedback_of(learner.graph.edges[0])
    torch.testing.assert_close(learner.model.fc1.bias.grad, signal.sum(0))


def test_what_has_no_derivative_to_replace_is_refused() -> None:
    x = torch.randn(8, 4)
    with pytest.raises(fb.SiteError, match=r"Functional has is no elementwise activation"):
        fb.attach(Functional(), fb.DFA(derivative="one"), example=x)
    with pytest.raises(fb.SiteError, match=r"'fc1' is no elementwise activation"):
        fb.attach(Summed(), fb.DFA(derivative="one"), example=x, sites=["fc1"])
    with pytest.raises(fb.AttachError, match=r"sites='blocks' are no inputs of activations"):
        fb.attach(Summed(), fb.DFA(derivative="one"), example=x, sites="blocks")
    with pytest.raises(fb.AttachError, match=r"no derivative 'sine': choose one of one, step"):
        fb.DFA(derivative="sine")
    with pytest.raises(fb.AttachError, match=r"cannot be mixed"):
        fb.Mixed({"a*": fb.DFA(derivative="one"), "*": fb.DFA()})
