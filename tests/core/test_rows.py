"""The error of a sample reaches the activities of that sample and no other, or `attach` says that it would not."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import feedbackward as fb

N = 6


def sorts(h: Tensor) -> Tensor:
    return h[h.flatten(1).sum(1).argsort()]


def interleaves(h: Tensor) -> Tensor:
    return h.reshape(2, len(h) // 2, *h.shape[1:]).transpose(0, 1).reshape(h.shape)


def routes(h: Tensor) -> Tensor:
    """Rows by expert, as a mixture of experts groups them."""
    expert = h.flatten(1).argmax(1) % 2
    return torch.cat([h[expert == 0], h[expert == 1]])


def gathers(h: Tensor) -> Tensor:
    order = torch.arange(len(h)).flip(0).view(-1, *[1] * (h.dim() - 1))
    return h.gather(0, order.expand_as(h))


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "stays": lambda h: h,
    "scales": lambda h: h * 2,
    "sorts": sorts,
    "flips": lambda h: h.flip(0),
    "rolls": lambda h: h.roll(1, 0),
    "interleaves": interleaves,
    "routes": routes,
    "gathers": gathers,
    "swaps halves": lambda h: torch.cat(h.chunk(2)[::-1]),
    "swaps two rows": lambda h: h[[1, 0, *range(2, len(h))]],
    "turns time-first": lambda h: h.transpose(0, 1),
}


class Moved(nn.Module):
    """Layers over [N, N, features] or [N, features], in each of which rows may move; and in the end they may move again."""

    def __init__(self, moves: list[str], width: int = 5) -> None:
        super().__init__()
        *self.moves, self.last = moves
        moves = self.moves
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in moves)
        self.acts = nn.ModuleList(nn.Tanh() for _ in moves)
        self.out = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer, act, move in zip(self.layers, self.acts, self.moves, strict=True):
            x = act(MOVES[move](layer(x)))
        return MOVES[self.last](self.out(x))


def leads_to(model: nn.Module, x: Tensor) -> list[Tensor]:
    """For every activity [N, N] of numbers: what a row of the output has to do with a row of the activity."""
    kept: list[Tensor] = []
    hooks = [act.register_forward_hook(lambda m, i, o: kept.append(o)) for act in model.acts]
    output = model(x)
    rows = [torch.autograd.grad(row.square().sum(), kept, retain_graph=True) for row in output]
    for hook in hooks:
        hook.remove()
    return [torch.stack([row[i].flatten(1).norm(dim=1) for row in rows]) for i in range(len(kept))]


@examples(80, 800)
@given(
    st.lists(st.sampled_from(sorted(MOVES)), min_size=2, max_size=5),
    st.booleans(),
    st.sampled_from([5, 70]),
    st.integers(),
)
def test_feedback_reaches_the_rows_that_made_the_error(
    moves: list[str], tokens: bool, width: int, seed: int
) -> None:
    tokens = tokens or "turns time-first" in moves
    torch.manual_seed(seed % 1000)
    model = Moved(moves, width)
    x = torch.randn((N, N, width) if tokens else (N, width))
    identity = torch.eye(N, dtype=torch.bool)
    kept_apart = all(torch.equal(maps > 0, identity) for maps in leads_to(model, x))
    try:
        fb.attach(model, fb.DFA(), example=x)
        refused = ""
    except fb.AttachError as error:
        refused = str(error)
    assert ("does not keep the rows in place" in refused) == (not kept_apart), refused


STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "stays": lambda h: h,
    "scales": lambda h: h * 2,
    "reverses": lambda h: h.flip(1),
    "rolls": lambda h: h.roll(1, 1),
    "shifts": lambda h: F.pad(h, (0, 0, 1, -1)),
    "sorts": lambda h: h.gather(1, h.sum(2, keepdim=True).argsort(1).expand_as(h)),
    "swaps two": lambda h: h[:, [1, 0, *range(2, h.shape[1])]],
}


@examples(25, 250)
@given(st.lists(st.sampled_from(sorted(STEPS)), min_size=2, max_size=4), st.integers(3, 9))
def test_feedback_reaches_the_tokens_that_made_the_error(moves: list[str], steps: int) -> None:
    torch.manual_seed(len(moves))
    model, x = Moved(["stays"] * len(moves)), torch.randn(4, steps, 5)
    with patch.dict(MOVES, {f"step {i}": STEPS[move] for i, move in enumerate(moves)}):
        *model.moves, model.last = [f"step {i}" for i in range(len(moves))]
        kept: list[Tensor] = []
        for act in model.acts:
            act.register_forward_hook(lambda m, i, o: kept.append(o))
        output = model(x)
        tokens = torch.arange(4 * steps)
        apart = True
        for token in tokens:
            own = torch.autograd.grad(
                output.flatten(0, 1)[token].square().sum(), kept, retain_graph=True
            )
            reached = [h.flatten(0, 1).norm(dim=1).nonzero().flatten().tolist() for h in own]
            apart = apart and all(set(rows) <= {int(token)} for rows in reached)
        try:
            fb.attach(model, fb.DFA(), example=x)
            refused = ""
        except fb.AttachError as error:
            refused = str(error)
    assert ("of the site leads to another" in refused) == (not apart), (refused, apart)


def test_tokens_that_are_mixed_are_taken() -> None:
    model = nn.Sequential(
        nn.Linear(5, 8),
        nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True),
        nn.Linear(8, 3),
    )
    for sites in ("layers", "blocks"):
        fb.attach(model, fb.DFA(), example=torch.randn(4, 6, 5), sites=sites).detach()


def hub() -> Tensor:
    """The weights of a graph whose first node listens to all others more than to itself."""
    weights = torch.eye(N) / 2
    weights[0] = 0.3
    weights[0, 0] = 0.05
    return weights


def mixed(kind: str) -> tuple[nn.Module, Tensor]:
    """Models whose rows depend on each other, each row most on itself, and what only looks like that."""
    torch.manual_seed(0)
    body = [nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)]
    norm = nn.BatchNorm1d(6)
    if kind == "batch norm":
        return nn.Sequential(*body[:3], norm, *body[3:]), torch.randn(N, 5)
    if kind == "batch norm, two rows":
        return nn.Sequential(*body[:3], norm, *body[3:]), torch.randn(2, 5)
    if kind == "batch norm without statistics":
        norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
        return nn.Sequential(*body[:3], norm, *body[3:]), torch.randn(N, 5)
    if kind == "head that begins at zero":
        nn.init.zeros_(body[-1].weight)
        return nn.Sequential(*body), torch.randn(N, 5)
    if kind == "dead units":
        nn.init.constant_(body[0].bias, -100.0)
        body[1] = nn.ReLU()
        return nn.Sequential(*body), torch.randn(N, 5)
    between = {
        "attention over the batch": lambda h: h + F.softmax(h @ h.t(), -1) @ h,
        "graph with a hub": lambda h: hub() @ h,
        "graph": lambda h: (torch.eye(N) / 2 + torch.ones(N, N).tril(-1).triu(-2) / 4) @ h,
        "minibatch deviation": lambda h: torch.cat([h[:, :5], h.std(0).mean().expand(N, 1)], 1),
        "normalised over the batch": lambda h: h - h.mean(0),
        "moved and moved back": lambda h: torch.tanh(h.flip(0)).flip(0),
    }[kind]

    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low, self.high = nn.Sequential(*body[:4]), body[4]

        def forward(self, x: Tensor) -> Tensor:
            return self.high(between(self.low(x)))

    return Between(), torch.randn(N, 5)


KINDS = (
    "batch norm",
    "batch norm, two rows",
    "batch norm without statistics",
    "head that begins at zero",
    "dead units",
    "attention over the batch",
    "graph",
    "graph with a hub",
    "minibatch deviation",
    "normalised over the batch",
    "moved and moved back",
)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_depend_on_each_other_are_taken(kind: str) -> None:
    model, x = mixed(kind)
    learner = fb.attach(model, fb.DFA(), example=x)
    learner(x).square().sum().backward()


class Reversed(nn.Module):
    """What leaves the second activity is in the reversed order of the batch."""

    def __init__(self, norm: nn.Module | None = None, zero: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.act, self.act2, self.norm = nn.Tanh(), nn.Tanh(), norm or nn.Identity()
        if zero:
            nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.act2(self.norm(self.b(self.act(self.a(x)))).flip(0)))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(6), nn.BatchNorm1d(6, track_running_stats=False)])
@pytest.mark.parametrize("rows", [N, 4])
def test_batch_norm_hides_no_reordering(norm: nn.Module, rows: int) -> None:
    with pytest.raises(fb.AttachError, match="does not keep the rows in place"):
        fb.attach(Reversed(norm), fb.DFA(), example=torch.randn(rows, 5))


def test_of_two_rows_batch_norm_leaves_no_gradient_to_see_in_training() -> None:
    with pytest.raises(fb.AttachError, match="does not keep the rows in place"):
        fb.attach(Reversed(nn.BatchNorm1d(6)), fb.DFA(), example=torch.randn(2, 5))


def test_what_the_example_cannot_show_is_seen_in_training() -> None:
    learner = fb.attach(Reversed(), fb.DFA(), example=torch.randn(1, 5))
    learner(torch.randn(1, 5)).sum().backward()
    with pytest.raises(fb.AttachError, match="does not keep the rows in place"):
        learner(torch.randn(2, 5))


def test_a_head_that_begins_at_zero_is_looked_at_when_it_has_learned() -> None:
    torch.manual_seed(0)
    x = torch.randn(N, 5)
    learner = fb.attach(Reversed(zero=True), fb.DFA(), example=x)
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    (learner(x) - 1).square().sum().backward()
    optimizer.step()
    with pytest.raises(fb.AttachError, match="does not keep the rows in place"):
        learner(x)


def test_a_batch_that_is_sorted_by_length_is_seen_when_lengths_differ() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)
            self.act, self.act2 = nn.Tanh(), nn.Tanh()

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            order = lengths.argsort(descending=True, stable=True)
            return self.out(self.act2(self.b(self.act(self.a(x[order])))))[order.argsort()]

    x, same = torch.randn(N, 5), torch.full((N,), 3)
    learner = fb.attach(Sorted(), fb.DFA(), example=(x, same))
    with pytest.raises(fb.AttachError, match=r"row . of the site leads to another row"):
        learner(x, torch.tensor([1, 2, 3, 4, 5, 6]))
    learner = fb.attach(Sorted(), fb.DFA(), example=(x, same))
    # in order already: seen, and taken for what it is
    learner(x, torch.tensor([6, 5, 4, 3, 2, 1])).sum().backward()
    with pytest.raises(fb.AttachError, match="error_at="):
        fb.attach(Sorted(), fb.DFA(), example=(x, torch.arange(N)))
    learner = fb.attach(Sorted(), fb.DFA(), example=(x, torch.arange(N)), error_at="out")
    learner(x, torch.arange(N)).sum().backward()


class Towers(nn.Module):
    """Two towers and the table of their products: its rows are images, its columns texts."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("image", "text"):
            self.add_module(name, nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6)))
        self.end = nn.Identity()

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return self.end(self.image(image) @ self.text(text).t())


def test_columns_are_no_rows() -> None:
    example = (torch.randn(N, 5), torch.randn(N, 5))
    with pytest.raises(fb.AttachError, match=r"dimension 1 of the source's \[6, 6\]"):
        fb.attach(Towers(), fb.DFA(), example=example)
    learner = fb.attach(Towers(), fb.DFA(), example=example, sites=["image.1"])
    learner(*example).sum().backward()


@pytest.mark.parametrize("rule", [fb.DKP(), fb.DRTP(), fb.DGL(), fb.rules.DTP()], ids=str)
def test_every_rule_that_pairs_rows_asks(rule: fb.Rule) -> None:
    with pytest.raises(fb.AttachError, match="does not keep the rows in place"):
        fb.attach(Reversed(), rule, example=torch.randn(N, 5))


def test_chains_pair_the_rows_of_one_layer_only() -> None:
    x = torch.randn(N, 5)
    learner = fb.attach(Reversed(), fb.FA(), example=x)
    learner(x).sum().backward()


def test_looking_leaves_no_trace() -> None:
    x, model = torch.randn(N, 5), Reversed(nn.BatchNorm1d(6))
    model.forward = lambda x: model.out(model.act2(model.norm(model.b(model.act(model.a(x))))))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    fb.attach(model, fb.DFA(), example=x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())
    assert model.norm.training
