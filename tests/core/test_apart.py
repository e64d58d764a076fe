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


def by_factors_transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (v.mT @ (k @ q.mT).softmax(1)).mT


def by_einsum_of_values_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.unflatten(-1, (2, -1)) for t in (q, k, v))
    weights = torch.einsum("nshd,nthd->nhst", k, q).softmax(2)
    return torch.einsum("nhst,nshd->nthd", weights, v).flatten(2)


def by_sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Additive attention (Bahdanau et al. 2015), without a product."""
    weights = (q[:, :, None] + k[:, None]).tanh().sum(-1, keepdim=True).softmax(2)
    return (weights * v[:, None]).sum(2)


def by_steps(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A loop over the steps of a decoder, each of which starts with the state before (Luong et al. 2015)."""
    state, outputs = v.mean(1), []
    for step in q.unbind(1):
        weights = (k @ (state + step).unsqueeze(-1)).softmax(1)
        state = torch.tanh(step + (weights.mT @ v).squeeze(1))
        outputs.append(state)
    return torch.stack(outputs, 1)


def by_steps_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    made, state = torch.zeros_like(q), v.mean(1)
    for i in range(q.shape[1]):
        state = torch.tanh(state + q[:, i] + k.amax(1))
        made[:, i] = state
    return made


def by_prefix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Tokens in front of others, and attention among all of them."""
    t = torch.cat([k + v, q], 1)
    return (t + by_matmul(t, t, t))[:, k.shape[1] :]


# of two streams: what may not depend on the order of the second
FROM_ALL: dict[str, Mix] = {
    **ATTENTION,
    "distances": lambda q, k, v: (-torch.cdist(q, k)).softmax(-1) @ v,
    "factors transposed": by_factors_transposed,
    "values first": by_einsum_of_values_first,
    "additive": by_sums,
    "linear attention": lambda q, k, v: q @ (k.mT @ v),
    "three factors": lambda q, k, v: torch.einsum("ntd,nsd,nse->nte", q, k, v),
    "one query at a time": lambda q, k, v: torch.cat(
        [by_matmul(q[:, i : i + 1], k, v) for i in range(q.shape[1])], 1
    ),
    "one sample at a time": lambda q, k, v: torch.stack(
        [(a @ b.T).softmax(-1) @ c for a, b, c in zip(q, k, v, strict=True)]
    ),
    "steps": by_steps,
    "steps written": by_steps_written,
    "prefix": by_prefix,
    "mean": lambda q, k, v: q + v.mean(1, keepdim=True),
    "gate": lambda q, k, v: q * v.sum(1)[:, None].expand_as(q),
    "latents": lambda q, k, v: by_matmul(q, *[by_matmul(torch.ones_like(q) / 3, k, v)] * 2),
    "copies by number": lambda q, k, v: (
        q
        + torch.zeros_like(q).scatter_add(
            2, torch.zeros(N, q.shape[1], k.shape[1], dtype=torch.int64), q @ (k + v).mT
        )
    ),
    "windows of the queries": lambda q, k, v: by_matmul(q.reshape(N, -1, 2, D).flatten(1, 2), k, v),
}


@pytest.mark.filterwarnings("ignore:no segment trains these parameters")
@pytest.mark.parametrize("kind", FROM_ALL)
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("s", [1, S, T])
def test_tokens_are_apart_whose_order_does_not_matter(kind: str, skip: bool, s: int) -> None:
    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return FROM_ALL[kind](q, k, v) + skip * q

    learner = attached(fb.DFA(operator=fb.Dense()), mix, s)
    x, y, _ = inputs(s)
    with torch.no_grad():
        torch.testing.assert_close(learner.model(x.flip(1), y), learner.model(x, y))
    assert [site.apart for site in learner.sites] == [True, True, False]


def recurrent(net: Seq2Seq, kind: str, attention: Mix) -> Mix:
    rnn = {"gru": nn.GRU, "lstm": nn.LSTM}[kind]
    net.encode, net.decode = (rnn(D, D, batch_first=True).double() for _ in range(2))

    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        memory, state = net.encode(k)
        output, _ = net.decode(q, state)
        return output + attention(output, memory, memory + v.amax(1, keepdim=True))

    return mix


@pytest.mark.parametrize("kind", ["gru", "lstm"])
@pytest.mark.parametrize("attention", [by_matmul, by_steps])
@pytest.mark.parametrize("s", [S, T])
def test_last_state_of_a_recurrent_encoder_belongs_to_no_token(
    kind: str, attention: Mix, s: int
) -> None:
    torch.manual_seed(0)
    net = Seq2Seq().double()
    net.mix = recurrent(net, kind, attention)
    sites = ["encoder.1", "encoder.3", "query", "act"]
    learner = fb.attach(net, fb.DFA(), example=inputs(s)[:2], sites=sites)
    assert [site.apart for site in learner.sites] == [True, True, False, False]


def test_example_of_one_token() -> None:
    torch.manual_seed(0)
    sites = ["encoder.1", "encoder.3", "act"]
    learner = fb.attach(Seq2Seq().double(), fb.DFA(), example=inputs(S, 1)[:2], sites=sites)
    assert [site.apart for site in learner.sites] == [True, True, False]
    assert learner(*inputs(2, 6)[:2]).shape == (N, 6, C)


class Mixed(nn.Module):
    """Layers of tokens that mix them by other means than attention to another sequence."""

    def __init__(self, mix: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.mix, self.first, self.act = mix, nn.Linear(D, D), nn.Tanh()
        self.over = nn.Parameter(torch.randn(T, T))
        self.along, self.kernel = nn.Linear(T, T), nn.Parameter(torch.randn(D, D, 3))
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
    "attention with factors transposed": lambda m, h: by_factors_transposed(
        m.query(h), m.key(h), h
    ),
    "additive attention": lambda m, h: by_sums(m.query(h), m.key(h), h),
    "a softmax of a matrix of tokens": lambda m, h: m.over.softmax(-1).expand(N, T, T) @ h,
    "windows": lambda m, h: by_matmul(*[h.view(N * 2, 2, D)] * 3).view(N, T, D),
    "a loop": lambda m, h: torch.stack([m.query(t).tanh() for t in h.unbind(1)], 1),
    "a loop of slices": lambda m, h: torch.cat(
        [by_matmul(h[:, i : i + 1], h[:, : i + 1], h[:, : i + 1]) for i in range(T)], 1
    ),
    "a token in front": lambda m, h: by_matmul(*[torch.cat([h[:, :1] * 0, h], 1)] * 3)[:, 1:],
    "half as many tokens": lambda m, h: m.key(h.view(N, 2, 2, D).sum(2)).repeat_interleave(2, 1),
    "a product for each token": lambda m, h: (
        (m.key(h).view(-1, 2, 3).mT @ h.view(-1, 2, 3)).flatten(1)[:, :D].reshape(N, T, D)
    ),
    "distances": lambda m, h: (-torch.cdist(m.query(h), h)).softmax(-1) @ h,
    "channels that attend": lambda m, h: ((m.query(h).mT @ m.key(h)).softmax(-1) @ h.mT).mT,
    "experts": lambda m, h: (
        torch.zeros(N * T, D)
        .index_add(0, torch.arange(N * T)[1:], m.key(h.flatten(0, 1)[1:]))
        .view(N, T, D)
    ),
    "a convolution of tokens": lambda m, h: nn.functional.conv1d(h.mT, m.kernel, padding=1).mT,
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
    with pytest.raises(
        fb.AttachError, match=r"DGL classifies at site 'encoder\.1', whose tokens are others"
    ):
        attached(fb.DGL())
    with pytest.raises(fb.AttachError, match="learns its feedback in a phase"):
        attached(fb.rules.FDFA())


def test_its_cost_is_that_of_all_tokens() -> None:
    x, y, _ = inputs()
    # a product with B [C, D] for each token of two sites of S tokens and one of T; sparse feedback has two weights for each unit
    for operator, weights in ((fb.Dense(), C * D), (fb.Sparse(2), 2 * D)):
        cost = fb.count_cost(attached(fb.DFA(operator=operator)), (x, y))
        assert cost.feedback == N * (2 * S + T) * weights


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
