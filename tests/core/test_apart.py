"""Sites whose tokens are not those whose error is sent: every token of an encoder gets the sum of a decoder's errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import feedbackward as fb

N, S, T, D, C = 3, 5, 4, 6, 7
Mix = Callable[[Tensor, Tensor, Tensor], Tensor]


def by_matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(1, 2)).softmax(-1) @ v


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("ntd,nsd->nts", q, k).softmax(-1)
    return torch.einsum("nts,nsd->ntd", weights, v)


def by_baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.zeros(len(q), q.shape[1], k.shape[1], dtype=q.dtype)
    return torch.baddbmm(mask, q, k.transpose(1, 2)).softmax(-1).bmm(v)


ATTENTION: dict[str, Mix] = {
    "fused": F.scaled_dot_product_attention,
    "matmul": by_matmul,
    "einsum": by_einsum,
    "baddbmm": by_baddbmm,
}


class Seq2Seq(nn.Module):
    """An encoder of [N, S, D], and a decoder of [N, T, D] that attends to it: [N, T, C]."""

    def __init__(self, mix: Mix = by_matmul) -> None:
        super().__init__()
        self.mix = mix
        self.encoder = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D), nn.Tanh())
        self.query, self.key, self.value = (nn.Linear(D, D) for _ in range(3))
        self.act, self.head = nn.Tanh(), nn.Linear(D, C)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        h = self.encoder(source)
        return self.head(self.act(self.mix(self.query(target), self.key(h), self.value(h))))


def inputs(s: int = S, t: int = T) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    x, y = (torch.randn(N, length, D, dtype=torch.float64) for length in (s, t))
    return x, y, torch.randint(C, (N, t))


def attached(rule: fb.Rule, mix: Mix = by_matmul, s: int = S) -> fb.Learner:
    torch.manual_seed(0)
    sites = ["encoder.1", "encoder.3", "act"]
    return fb.attach(Seq2Seq(mix).double(), rule, example=inputs(s)[:2], sites=sites)


def loss_of(scores: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("kind", ATTENTION)
@pytest.mark.parametrize("s", [S, T])
def test_every_token_of_an_encoder_gets_the_sum_of_the_errors(kind: str, s: int) -> None:
    learner = attached(fb.DFA(), ATTENTION[kind], s)
    x, y, labels = inputs(s)
    net, (lowest, upper, top) = learner.model, learner.graph.edges
    assert [e.site.apart for e in (lowest, upper, top)] == [True, True, False]
    loss_of(learner(x, y), labels).backward()
    with torch.no_grad():
        scores = net(x, y)
        errors = (scores.softmax(-1) - F.one_hot(labels, C)) / labels.numel()
        h = net.encoder[1](net.encoder[0](x))
        B = learner.feedback_of(upper)
        assert B.shape == (C, D)
        expected = torch.zeros(D, D, dtype=torch.float64)
        for n in range(N):
            signal = sum(errors[n, t] for t in range(T)) @ B
            for i in range(s):
                slope = 1 - net.encoder[3](net.encoder[2](h[n, i])).square()
                expected += torch.outer(signal * slope, h[n, i])
    torch.testing.assert_close(net.encoder[2].weight.grad, expected)


def test_feedback_learns_from_the_sum_at_every_token() -> None:
    learner = attached(fb.DKP.published())
    x, y, labels = inputs()
    loss_of(learner(x, y), labels).backward()
    net, edge = learner.model, learner.graph.edges[1]
    with torch.no_grad():
        errors = (net(x, y).softmax(-1) - F.one_hot(labels, C)) / labels.numel()
        expected = torch.einsum("ntc,nsd->cd", errors, net.encoder(x))
    torch.testing.assert_close(learner.feedback_of(edge).grad, expected)


@pytest.mark.parametrize("rule", [fb.DFA(), fb.DKP(operator=fb.Dense()), fb.rules.DRTP()], ids=repr)
def test_lengths_may_change(rule: fb.Rule) -> None:
    learner = attached(rule)
    for s, t in ((S, T), (2, 6), (7, 7)):
        x, y, labels = inputs(s, t)
        learner.target(labels)
        loss_of(learner(x, y), labels).backward()
        assert all(p.grad.any() for p in learner.model.encoder.parameters())


class Mixed(nn.Module):
    """Layers of tokens that mix them by other means than attention to another sequence."""

    def __init__(self, mix: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.mix, self.first, self.act = mix, nn.Linear(D, D), nn.Tanh()
        self.over = nn.Parameter(torch.randn(T, T))
        self.along = nn.Linear(T, T)
        self.rnn = nn.GRU(D, D, batch_first=True)
        self.query, self.key = nn.Linear(D, D), nn.Linear(D, D)
        self.head = nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self, self.act(self.first(x))))


KEPT: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "a skip path": lambda m, h: h + by_matmul(h, h, h),
    "queries": lambda m, h: by_matmul(m.query(h), m.key(h), h),
    "linear attention": lambda m, h: m.query(h) @ (m.key(h).transpose(1, 2) @ h),
    "a matrix of tokens": lambda m, h: m.over @ h,
    "a layer along tokens": lambda m, h: m.along(h.transpose(1, 2)).transpose(1, 2),
    "a constant matrix of each sample": lambda m, h: torch.ones(len(h), T, T).tril() @ h,
    "a recurrent layer": lambda m, h: m.rnn(h)[0],
    "a sum along tokens": lambda m, h: h.cumsum(1),
}


@pytest.mark.filterwarnings("ignore:no segment trains these parameters")
@pytest.mark.parametrize("kind", KEPT)
def test_tokens_that_stay_at_their_place_get_their_own_error(kind: str) -> None:
    x = torch.randn(N, T, D)
    learner = fb.attach(Mixed(KEPT[kind]), fb.DFA(), example=x, sites=["act"])
    (edge,) = learner.graph.edges
    assert not edge.site.apart
    assert edge.leading == 2


def test_what_needs_a_token_for_a_token_is_refused() -> None:
    with pytest.raises(fb.AttachError, match=r"DGL classifies at site 'encoder\.1'"):
        attached(fb.DGL())
    with pytest.raises(fb.AttachError, match="learns its feedback in a phase"):
        attached(fb.rules.FDFA())


def test_its_cost_is_that_of_all_tokens() -> None:
    x, y, _ = inputs()
    learner = attached(fb.DFA())
    cost = fb.count_cost(learner, (x, y))
    # a product with B [C, D] for each token of two sites of S tokens and one of T
    assert cost.feedback == N * (2 * S + T) * C * D


@pytest.mark.filterwarnings("ignore:the feedback weights take")
def test_transformer_of_pytorch() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Transformer(8, 2, 2, 2, 16, 0.0, batch_first=True)
            self.head = nn.Linear(8, C)

        def forward(self, source: Tensor, target: Tensor) -> Tensor:
            return self.head(self.body(source, target))

    x, y = torch.randn(N, S, 8), torch.randn(N, S, 8)
    sites = [f"body.{part}.layers.{i}" for part in ("encoder", "decoder") for i in range(2)]
    learner = fb.attach(Net(), fb.DFA(), example=(x, y), sites=sites)
    assert [site.apart for site in learner.sites] == [True, True, False, False]
    learner(x[:, :2], y).sum().backward()
