"""The cost of a step against formulas by hand; see `test_cost_counted` for counts of real steps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from priced import N, TokenNet, counted, macs_of_a_step, mlp
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from wired import Net

import feedbackward as fb

# of 6-8-5-3 units: forward; weight and input gradients; signals; learning; bytes of weights, errors and signals; steps
FORWARD, UP, OUT, HIDDEN = N * (48 + 40 + 15), N * (40 + 15), N * 3, 8 + 5
BY_HAND = {
    "bp": (FORWARD, UP, 0, 0, 0, 0, 0, 2),
    "fa": (FORWARD, 0, UP, 0, 4 * (40 + 15), 4 * N * (5 + 3), 4 * N * HIDDEN, 2),
    "kp": (FORWARD, 0, UP, 0, 4 * (40 + 15), 4 * N * (5 + 3), 4 * N * HIDDEN, 2),
    "symmetric_alignment": (FORWARD, 0, UP, 0, 4 * (40 + 15), 4 * N * (5 + 3), 4 * N * HIDDEN, 2),
    "dfa": (FORWARD, 0, OUT * HIDDEN, 0, 4 * 3 * HIDDEN, 4 * 2 * OUT, 4 * N * HIDDEN, 1),
    # each site's matrix is made orthogonal: its product with itself, and 30 of 3 x 3
    "dkp": (
        FORWARD,
        0,
        OUT * HIDDEN + 9 * HIDDEN + 2 * 30 * 27,
        OUT * HIDDEN,
        4 * 3 * HIDDEN,
        4 * 2 * OUT,
        4 * N * HIDDEN,
        1,
    ),
    "drtp": (FORWARD, 0, OUT * HIDDEN, 0, 4 * 3 * HIDDEN, 4 * 2 * OUT, 4 * N * HIDDEN, 0),
    "frozen": (N * 15, 0, 0, 0, 0, 0, 0, 0),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_three_layers_by_hand(name: str) -> None:
    cost = counted(fb.RULES[name](), mlp(6, 8, 5, 3), torch.randn(N, 6))
    assert (cost.batch, cost.forward, cost.auxiliary, cost.phase) == (N, FORWARD, 0, None)
    found = (cost.weight_gradients, cost.input_gradients, cost.feedback, cost.learning)
    sizes = (cost.feedback_bytes, cost.traffic_bytes, cost.signal_bytes)
    assert (*found, *sizes, cost.steps) == BY_HAND[name]
    assert cost.total == FORWARD + sum(found)


def test_bytes_held_by_hand() -> None:
    """Autograd keeps each layer's input, which is a ReLU's result. A segment keeps its input and its result."""
    joint, largest, target = 4 * N * (6 + 8 + 5), 4 * N * (6 + 8), 4 * N * 3
    held = {
        rule.name: counted(rule, mlp(6, 8, 5, 3), torch.randn(N, 6)).held
        for rule in (fb.BP(), fb.FA(), fb.DFA(), fb.DKP.published(), fb.DRTP(), fb.Frozen())
    }
    chain = {"joint": joint, "replay": None, "eager": None}
    star = {"joint": joint, "replay": largest, "eager": None}
    assert held == {
        "bp": chain,
        "fa": chain,
        "dfa": star,
        "dkp": star,
        "drtp": {"joint": joint + target, "replay": None, "eager": largest + target},
        "frozen": {"joint": joint, "replay": None, "eager": largest},
    }


def test_replay_computes_the_lower_part_of_the_forward_pass_twice() -> None:
    """What is trained in the first pass may hold as much as the largest segment: here the two upper layers."""
    cost = counted(fb.DFA(), mlp(6, 8, 5, 3), torch.randn(N, 6))
    assert cost.totals == {"joint": cost.total, "replay": cost.total + N * 48, "eager": None}


PLAIN = [
    (mlp(6, 8, 5, 3), (6,)),
    (
        nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.Flatten(), nn.Linear(12, 2)
        ),
        (2, 6, 6),
    ),
    (TokenNet(), (7, 5)),
]


@pytest.mark.parametrize(("model", "shape"), PLAIN, ids=["mlp", "conv", "tokens"])
def test_the_parts_of_backprop(model: nn.Module, shape: tuple[int, ...]) -> None:
    """A layer's gradients take as much as the layer each, the first has none below; two activities' product has two."""
    cost = counted(fb.BP(), model, torch.randn(N, *shape))
    first, *rest = [layer for name, layer in cost.layers.items() if name]
    assert first["input_gradients"] == 0
    assert all(layer["forward"] == layer["weight_gradients"] for layer in (first, *rest))
    assert all(layer["forward"] == layer["input_gradients"] for layer in rest)
    between = cost.layers.get("", {"forward": 0, "weight_gradients": 0, "input_gradients": 0})
    assert (between["weight_gradients"], between["input_gradients"]) == (0, 2 * between["forward"])
    assert (between["forward"] > 0) == isinstance(model, TokenNet)


def test_grouped_convolutions_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 9, 3, groups=3), nn.Flatten(), nn.Linear(36, 2)
    )
    low, middle, high = N * 16 * 6 * 4 * 9, N * 4 * 9 * (6 // 3) * 9, N * 36 * 2
    cost = counted(fb.BP(), model, torch.randn(N, 4, 6, 6))
    assert cost.forward == cost.weight_gradients == low + middle + high
    assert cost.input_gradients == middle + high


class TestSteps:
    """For backprop and chains one less than layers: the last layer's error is there without a product."""

    @pytest.mark.parametrize("rule", [fb.BP(), fb.FA(), fb.DFA()], ids=lambda rule: rule.name)
    def test_of_two_layers_are_the_same_for_all(self, rule: fb.Rule) -> None:
        assert counted(rule, mlp(6, 8, 3), torch.randn(N, 6)).steps == 1

    def test_from_a_hidden_source(self) -> None:
        """Its own error takes a product, the layers below wait for a second one."""
        assert counted(fb.DFA(), mlp(6, 8, 8, 8, 3), torch.randn(N, 6), error_at="4").steps == 2

    def test_within_segments_of_several_layers(self) -> None:
        """One for the edge, one for each layer of a segment but its last; three segments of two layers, a head of one."""
        x = torch.randn(N, 6)
        assert counted(fb.DFA(), mlp(*[6] * 7, 3), x, sites=["3", "7", "11"]).steps == 2

    def test_local_losses_wait_for_nothing(self) -> None:
        assert counted(fb.DGL(), mlp(6, 8, 8, 3), torch.randn(N, 6)).steps == 0

    @pytest.mark.parametrize("relays", [0, 1, 2])
    def test_relays(self, relays: int) -> None:
        """Each of the upper sites sends on what it gets to the next; the last of them feeds all that are left directly."""
        cost = counted(Relayed(relays), mlp(*[6] * 7, 3), torch.randn(N, 6))
        assert cost.steps == relays + 1
        assert cost.feedback == N * (3 * 6 + 5 * 36 if relays else 6 * 3 * 6)

    def test_attention_adds_its_own_products(self) -> None:
        """out <- mix <- A v <- q k <- qkv <- embed."""
        assert counted(fb.BP(), TokenNet(), torch.randn(N, 7, 5)).steps == 5


@dataclass(frozen=True)
class Relayed(fb.Rule):
    """Output -> top site -> ... -> the sites below the last relay."""

    relays: int

    name = label = "relayed"
    paper = "this test"

    def graph(self, sites: Sequence[fb.Site], source: fb.Source) -> fb.Graph:
        edges, left = [], list(sites)
        for _ in range(self.relays):
            top = left.pop()
            edges.append(fb.Edge(source, top, fb.Dense()))
            source = fb.Source(top.name, top.points, top.shape, top.tokens)
        return fb.Graph(
            tuple(sites), (*edges, *(fb.Edge(source, site, fb.Dense()) for site in left))
        )


def test_a_network_too_large_for_this_machine() -> None:
    wide = 100_000
    with torch.device("meta"):
        model, x = mlp(wide, wide, wide, 1000), torch.empty(64, wide)
    cost = counted(fb.DKP.published(), model, x)
    assert cost.forward == 64 * wide * (2 * wide + 1000)
    assert cost.feedback_bytes == 2 * 4 * 1000 * wide


def test_nothing_of_the_learner_changes() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(64, 3)
    )
    x = torch.randn(N, 2, 6, 6)
    learner = fb.attach(model, fb.DKP.published(), example=x)
    learner(x).sum().backward()
    handles = fb.step_in_backward(learner.parameters(), lambda p: torch.optim.SGD(p, lr=1.0))
    state = {key: value.clone() for key, value in learner.state_dict().items()}
    grads = [p.grad.clone() for p in learner.parameters() if p.grad is not None]
    random = torch.get_rng_state()
    fb.count_cost(learner.eval(), x)
    assert all(torch.equal(value, state[key]) for key, value in learner.state_dict().items())
    assert all(
        map(torch.equal, (p.grad for p in learner.parameters() if p.grad is not None), grads)
    )
    assert torch.equal(torch.get_rng_state(), random)
    assert not model.training
    assert all(p.device.type == "cpu" for p in learner.parameters())
    for handle in handles:
        handle.remove()


def test_a_batch_of_another_size() -> None:
    learner = fb.attach(mlp(6, 8, 5, 3), fb.DKP.published(), example=torch.randn(2, 6))
    small, large = (fb.count_cost(learner, torch.randn(n, 6)) for n in (2, 10))
    assert large.total == 5 * small.total
    assert large.traffic_bytes == 5 * small.traffic_bytes


def test_frozen_layers_get_no_signal() -> None:
    model = mlp(6, 8, 5, 3)
    model[0].requires_grad_(False)
    cost = counted(fb.DKP.published(), model, torch.randn(N, 6))
    assert cost.weight_gradients == FORWARD - N * 48
    assert (cost.feedback, cost.learning, cost.signal_bytes) == (OUT * 5, OUT * 5, 4 * N * 5)


def test_an_operator_without_products_says_what_it_multiplies() -> None:
    """Sparse feedback gathers and adds: one multiply-add per sample and weight that is not zero, and as many to learn it."""
    cost = counted(fb.DKP.published(operator=fb.Sparse(2)), mlp(6, 8, 5, 3), torch.randn(N, 6))
    assert (cost.feedback, cost.learning) == (N * 2 * HIDDEN, N * 2 * HIDDEN)


@pytest.mark.parametrize(
    "rule",
    [fb.rules.WeightMirror(), fb.rules.FDFA.published(), fb.rules.DDTP()],
    ids=lambda rule: rule.name,
)
def test_a_phase_of_the_feedback_is_counted_apart(rule: fb.Rule) -> None:
    x = torch.randn(N, 6)
    learner = fb.attach(mlp(6, 8, 5, 3), rule, example=x)
    with FlopCounterMode(display=False) as flops:
        learner.feedback_step(x)
    assert (cost := fb.count_cost(learner, x)).phase == flops.get_total_flops() / 2
    assert cost.total == macs_of_a_step(learner, x, lambda out: out.sum())


def test_signals_that_go_up_are_feedback() -> None:
    """IFA has one edge, to the first site; from there signals go up through the two layers between the sites."""
    cost = counted(fb.rules.IFA(), mlp(6, 8, 9, 7, 3), torch.randn(N, 6))
    assert (cost.forward, cost.steps) == (N * (48 + 72 + 63 + 21), 3)
    assert cost.feedback >= N * (3 * 8 + 72 + 63)


class TestModelsThatNeedValues:
    def test_are_counted_with_them(self) -> None:
        def wiring(net: Net, x: Tensor) -> Tensor:
            h = torch.relu(net.a(x))
            return net.out(h if float(h.detach().sum()) > 0 else -h)

        x = torch.rand(N, 6)
        model = Net(wiring, a=nn.Linear(6, 8), out=nn.Linear(8, 3))
        assert counted(fb.DFA(), model, x).forward == N * (48 + 24)

    def test_tensors_of_their_own_do_no_harm(self) -> None:
        scale = torch.ones(8)

        def wiring(net: Net, x: Tensor) -> Tensor:
            return net.out(torch.relu(net.a(x)) * scale + torch.arange(8))

        model = Net(wiring, a=nn.Linear(6, 8), out=nn.Linear(8, 3))
        assert counted(fb.DFA(), model, torch.randn(N, 6)).forward == N * (48 + 24)


def test_the_dictionary_is_plain() -> None:
    cost = counted(fb.DKP.published(), mlp(6, 8, 5, 3), torch.randn(N, 6))
    found = json.loads(json.dumps(cost.as_dict()))
    assert found["total"] == cost.total
    assert list(found["layers"]) == ["0", "2", "4"]


def test_a_rule_that_needs_more_than_a_step_says_so() -> None:
    with pytest.raises(fb.FeedbackError, match="Delayed"):
        counted(fb.rules.DSP(), mlp(6, 8, 3), torch.randn(N, 6))


class Joined(nn.Module):
    """Two branches of unequal length from one activity to one sum, whichever comes first."""

    def __init__(self, long_first: bool) -> None:
        super().__init__()
        self.long_first = long_first
        self.lower, self.act, self.head = nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)
        self.long, self.short = mlp(6, 6, 6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.lower(x))
        if self.long_first:
            return self.head(self.long(h) + self.short(h))
        return self.head(self.short(h) + self.long(h))


@pytest.mark.parametrize("long_first", [True, False])
def test_the_longest_path_counts(long_first: bool) -> None:
    """The head, and the three layers of the long branch."""
    assert counted(fb.BP(), Joined(long_first), torch.randn(N, 6)).steps == 4
