"""Models that are changed after `attach`: feedback goes on as if attached anew, or says "attach again"."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import feedbackward as fb


class Lora(nn.Module):
    """A layer with a low-rank path beside it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(6, 2, bias=False), nn.Linear(2, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Adapter(nn.Module):
    """An activation, and a small layer after it."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act, self.layer = act, nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.act(x))


class Quantised(nn.Module):
    """A layer whose numbers are integers: no gradient passes."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", (base.weight.detach() * 100).round())

    def forward(self, x: Tensor) -> Tensor:
        return (x.detach() @ self.weight.t()) / 100


class Doubled(nn.Linear):
    """Applies its weight in another way."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Net(nn.Module):
    """Two blocks whose activities modules make, then a function's; a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.body = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.ReLU(), nn.Dropout(0.0))
        self.mid, self.act, self.head = nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.mid(torch.sigmoid(self.body(self.stem(x))))))


def put(m: nn.Module, name: str, make: Callable[[nn.Module], nn.Module]) -> None:
    m.set_submodule(name, make(m.get_submodule(name)))


CHANGES: dict[str, Callable[[Net], object]] = {
    "prune first": lambda m: prune.l1_unstructured(m.stem[0], "weight", 0.5),
    "prune middle": lambda m: prune.l1_unstructured(m.mid, "weight", 0.5),
    "prune head": lambda m: prune.random_unstructured(m.head, "bias", 0.5),
    "weight norm": lambda m: parametrizations.weight_norm(m.body[0]),
    "spectral norm": lambda m: parametrizations.spectral_norm(m.mid),
    "old weight norm": lambda m: nn.utils.weight_norm(m.body[0]),
    "orthogonal": lambda m: parametrizations.orthogonal(m.mid),
    "symmetric": lambda m: parametrize.register_parametrization(m.mid, "weight", Symmetric()),
    "lora where a function's output is cut": lambda m: put(m, "mid", Lora),
    "lora where a module's output is cut": lambda m: put(m, "body.0", Lora),
    "adapter after a site": lambda m: put(m, "stem.1", Adapter),
    "adapter at a functional site": lambda m: put(m, "body.2", Adapter),
    "activation at a site": lambda m: put(m, "act", lambda old: nn.ReLU()),
    "activation below a site": lambda m: put(m, "body.2", lambda old: nn.GELU()),
    "head replaced": lambda m: put(m, "head", lambda old: nn.Linear(6, 3)),
    "first replaced": lambda m: put(m, "stem.0", lambda old: nn.Linear(4, 6)),
    "norm folded": lambda m: put(m, "body.1", lambda old: nn.Identity()),
    "norm exchanged": lambda m: put(m, "body.1", lambda old: nn.RMSNorm(6)),
    "quantised": lambda m: put(m, "body.0", Quantised),
    "dropout put in": lambda m: m.body.insert(1, nn.Dropout(0.0)),
    "dropout added": lambda m: m.stem.append(nn.Dropout(0.0)),
    "unused part": lambda m: m.add_module("unused", nn.Linear(2, 2)),
    "tied": lambda m: setattr(m.mid, "weight", m.body[0].weight),
    "new weight": lambda m: setattr(m.mid, "weight", nn.Parameter(torch.ones(6, 6))),
    "hook on a site": lambda m: m.act.register_forward_hook(lambda mod, given, out: 2 * out),
    "hook before a site": lambda m: m.mid.register_forward_pre_hook(
        lambda mod, given: 2 * given[0]
    ),
    "another class": lambda m: setattr(m.mid, "__class__", Doubled),
    "forward patched": lambda m: setattr(
        m.mid, "forward", lambda x: 2 * nn.functional.linear(x, m.mid.weight, m.mid.bias)
    ),
    "block copied": lambda m: setattr(m, "stem", copy.deepcopy(m.stem)),
}


class Symmetric(nn.Module):
    """A matrix and its transpose."""

    def forward(self, w: Tensor) -> Tensor:
        return w + w.t()


RULES = (fb.DFA(), fb.DGL(), fb.FA(), fb.KolenPollack(), fb.rules.SignSymmetry(), fb.rules.USF())


def gradients(learner: fb.Learner, x: Tensor, y: Tensor) -> dict[str, Tensor | None]:
    learner.zero_grad()
    learner.target(y)
    nn.functional.cross_entropy(learner(x), y).backward()
    return {name: p.grad for name, p in learner.model.named_parameters()}


@examples(60, 600)
@given(
    st.lists(st.sampled_from(sorted(CHANGES)), min_size=1, max_size=2, unique=True),
    st.sampled_from(RULES),
    st.booleans(),
)
def test_changed_models_are_followed_or_refused(
    changes: list[str], rule: fb.Rule, trained_before: bool
) -> None:
    torch.manual_seed(0)
    model, x, y = Net(), torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    learner = fb.attach(model, rule, example=x)
    if trained_before:
        gradients(learner, x, y)
    try:
        for change in changes:
            CHANGES[change](model)
        model.eval()(x)
        model.train()
    except (ValueError, AttributeError, KeyError, IndexError, RuntimeError, TypeError):
        # the one change does not allow the other
        return
    state = {name: t.clone() for name, t in model.state_dict().items()}
    try:
        found = gradients(learner, x, y)
        refused = ""
    except fb.AttachError as error:
        refused = str(error)
    if refused:
        assert "attach again" in refused or "changed after it was attached" in refused
        return
    plan, names = learner.plan, [site.name for site in learner.graph.sites]
    anew = fb.attach(learner.detach(), rule, example=x, sites=_names(learner))
    if [site.name for site in anew.graph.sites] != names:
        # layers were put in that would be fed as well
        return
    # spectral norm goes on in every pass
    model.load_state_dict(state)
    anew.feedback.load_state_dict(learner.feedback.state_dict())
    expected = gradients(anew, x, y)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert (grad is None) == (found[name] is None), name
        if grad is not None:
            torch.testing.assert_close(found[name], grad, msg=name)
    assert plan.segments == anew.plan.segments
    assert plan.head == anew.plan.head
    assert plan.unreached == anew.plan.unreached


def _names(learner: fb.Learner) -> object:
    """The sites of a learner, to attach again with; of those that are no module's output, all layers'."""
    points = [site.points[0] for site in learner.graph.sites]
    if any(point.kind == "input" for point in points):
        return "layers"
    return [point.module for point in points]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("head replaced", r"'head' \(Linear\) was replaced by another Linear after the model was"),
        ("lora where a function's output is cut", r"'mid' \(Linear\) was replaced by a Lora"),
        ("activation at a site", r"'act' \(Tanh\) was replaced by a ReLU"),
        ("quantised", r"'body.0' \(Linear\) was replaced by a Quantised"),
    ],
)
def test_the_message_names_the_module(change: str, sentence: str) -> None:
    model = Net()
    learner = fb.attach(model, fb.DFA(), example=torch.randn(5, 4))
    CHANGES[change](model)
    with pytest.raises(fb.AttachError, match=sentence):
        learner(torch.randn(5, 4))


@pytest.mark.parametrize("change", ["prune middle", "activation below a site", "norm folded"])
def test_what_feedback_does_not_depend_on_may_change(change: str) -> None:
    model, x, y = Net(), torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    learner = fb.attach(model, fb.DFA(), example=x)
    CHANGES[change](model)
    assert all(grad is not None for grad in gradients(learner, x, y).values())
    loss = learner.backward(x, lambda out: out.square().mean(), schedule="replay")
    assert loss.isfinite()


def test_a_chain_that_shares_weights_says_that_they_are_re_parametrised() -> None:
    model = Net()
    learner = fb.attach(model, fb.KolenPollack(), example=torch.randn(5, 4))
    prune.l1_unstructured(model.mid, "weight", 0.5)
    with pytest.raises(fb.AttachError, match=r"changed after it was attached.*'mid.weight'"):
        learner(torch.randn(5, 4))
    with pytest.raises(fb.AttachError, match=r"changed after it was attached"):
        learner.backward(torch.randn(5, 4), lambda out: out.sum())


def test_weights_that_are_tied_later_are_noticed() -> None:
    model = Net()
    learner = fb.attach(model, fb.KolenPollack(), example=torch.randn(5, 4))
    CHANGES["tied"](model)
    with pytest.raises(fb.AttachError, match=r"changed after it was attached.*which is tied"):
        learner(torch.randn(5, 4))


@pytest.mark.parametrize("rule", [fb.FA(), fb.KolenPollack()], ids=str)
def test_a_chain_notices_weights_that_it_does_not_feed(rule: fb.Rule) -> None:
    """No hook is lost where an activation gives way to an adapter, but the error would travel through its weights."""
    model, x = Net(), torch.randn(5, 4)
    learner = fb.attach(model, rule, example=x)
    CHANGES["adapter at a functional site"](model)
    with pytest.raises(fb.AttachError, match=r"'body.2' \(ReLU\) was replaced by a"):
        learner(x)


@pytest.mark.parametrize("change", ["another class", "forward patched"])
@pytest.mark.parametrize("rule", [fb.FA(), fb.KolenPollack()], ids=str)
def test_a_chain_notices_that_a_layer_applies_its_weight_in_another_way(
    change: str, rule: fb.Rule
) -> None:
    model, x = Net(), torch.randn(5, 4)
    learner = fb.attach(model, rule, example=x)
    CHANGES[change](model)
    with pytest.raises(fb.AttachError, match=r"'mid' .*attach again"):
        learner(x)
    with pytest.raises(fb.AttachError, match="'mid'"):
        fb.attach(learner.detach(), rule, example=x)


def test_a_chain_refuses_a_layer_whose_output_a_hook_changes() -> None:
    model, x = Net(), torch.randn(5, 4)
    model.mid.register_forward_hook(lambda module, given, out: None)
    fb.attach(model, fb.FA(), example=x).detach()
    model.mid.register_forward_hook(lambda module, given, out: 2 * out)
    with pytest.raises(fb.AttachError, match=r"'mid' .*a hook or a forward of its own"):
        fb.attach(model, fb.FA(), example=x)


def test_a_part_without_neighbours_is_in_the_plan_where_it_is_used() -> None:
    model, x = (
        nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU()),
        torch.randn(5, 4),
    )
    learner = fb.attach(model, fb.DFA(), example=x, error_at="2", sites=["1"])
    model.append(nn.Linear(6, 3))
    learner(x).square().sum().backward()
    assert learner.plan.unreached == ()
    assert set(learner.plan.head.parameters) == {"2.weight", "2.bias", "4.weight", "4.bias"}


@pytest.mark.parametrize("schedule", ["joint", "replay"])
def test_every_schedule_says_attach_again(schedule: str) -> None:
    model, x = Net(), torch.randn(5, 4)
    learner = fb.attach(model, fb.DFA(), example=x)
    CHANGES["head replaced"](model)
    with pytest.raises(fb.AttachError, match="attach again"):
        learner.backward(x, lambda out: out.square().mean(), schedule)


@pytest.mark.parametrize("rule", [fb.KolenPollack(), fb.FA(), fb.DFA(), fb.DKP()], ids=str)
def test_layers_that_freeze_within_the_pass_are_followed_or_refused(rule: fb.Rule) -> None:
    class Freezing(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self[2].requires_grad_(self.trains)
            return super().forward(x)

    torch.manual_seed(0)
    model, x = (
        Freezing(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)),
        torch.randn(5, 4),
    )
    model.trains = True
    learner = fb.attach(model, rule, example=x)
    model.trains = False
    if isinstance(rule, fb.KolenPollack):
        # its weights stand under another name in the pass
        with pytest.raises(fb.FeedbackError, match=r"requires_grad_` before `learner"):
            learner(x)
        model[2].requires_grad_(False)
    learner(x).square().sum().backward()
    assert model[2].weight.grad is None
    assert model[0].weight.grad is not None
