"""Scores of a vocabulary for each token: direct rules take the error of what enters the layer that makes them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import feedbackward as fb

D, V, N, T = 6, 24, 3, 5
TOKENS = torch.randint(10, (N, T))
Ends = Callable[["Words", Tensor], Tensor]


class Words(nn.Module):
    """A body whose last module is a norm; `ends` makes the scores of it."""

    def __init__(self, ends: Ends | None = None, scores: int = V) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.body = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D), nn.Tanh())
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, scores)
        self.same, self.halves = nn.Identity(), Halves()
        self.ends = ends or (lambda net, h: net.head(h))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.ends(self, self.norm(self.body(self.embed(tokens))))


class Halves(nn.Module):
    def forward(self, h: Tensor) -> tuple[Tensor, ...]:
        return h.chunk(2, -1)


class Added(nn.Module):
    """A layer beside another, as adapters have it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.down = layer, nn.Linear(layer.in_features, 2)
        self.up = nn.Linear(2, layer.out_features)

    def forward(self, h: Tensor) -> Tensor:
        return self.layer(h) + self.up(self.down(h))


@pytest.mark.parametrize(
    ("rule", "scores", "source"),
    [
        (fb.DFA(), 24, "norm"),
        (fb.DKP(), 24, "norm"),
        (fb.DFA(derivative="tanh"), 24, "norm"),
        (fb.DFA(), 23, "head"),
        (fb.Mixed({"body.*": fb.DFA()}), 24, "norm"),
        # only above the norm there is a second site
        (fb.Mixed({"body.1": fb.DFA(), "*": fb.DKP()}), 24, "head"),
        (fb.Mixed({"body.1": fb.DRTP(), "*": fb.DKP()}), 24, "head"),
        # targets and local losses are of scores, and a chain's signals go through the head
        (fb.DRTP(), 24, "head"),
        (fb.DGL(), 24, "head"),
        (fb.KolenPollack(), 24, "head"),
    ],
    ids=repr,
)
def test_the_error_is_taken_below_a_vocabulary(rule: fb.Rule, scores: int, source: str) -> None:
    learner = fb.attach(Words(scores=scores), rule, example=TOKENS)
    assert learner.source.name == source
    assert f"error of '{source}'" in str(learner)


def test_where_the_error_of_scores_is_wanted_or_the_head_is_no_layer_of_tokens() -> None:
    assert fb.attach(Words(), fb.DFA(), example=TOKENS, error_at="head").source.name == "head"
    # the one site that is named takes the error of the scores, as before
    assert fb.attach(Words(), fb.DFA(), example=TOKENS, sites=["norm"]).source.name == "head"
    shallow = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 16))
    assert fb.attach(shallow, fb.DFA(), example=TOKENS).source.name == "3"
    plain = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 40))
    assert fb.attach(plain, fb.DFA(), example=torch.randn(3, 4)).source.name == "4"


# by what makes the scores of what the norm gives
ENDS: dict[str, Ends] = {
    "a module": lambda net, h: net.head(h),
    "of a part of it": lambda net, h: net.head(h[:, 0:, :]),
    "of a function of it": lambda net, h: net.head(D**-0.5 * h.tanh()),
    "of rows of tokens": lambda net, h: net.head(h.view(-1, D)),
    "returned as rows": lambda net, h: net.head(h).view(-1, V),
    "with the scores first": lambda net, h: net.head(h).transpose(1, 2),
    "with a bias": lambda net, h: net.head(h) + torch.arange(V),
    "capped": lambda net, h: 3 * (net.head(h) / 3).tanh(),
    "tied": lambda net, h: F.linear(h, net.embed.weight),
    "tied module": lambda net, h: net.tied(h),
    "in parts": lambda net, h: torch.cat([net.head(part) for part in h.split(2, 1)], 1),
    "normed": lambda net, h: net.normed(h),
    "in a container": lambda net, h: net.several(h),
    "of an identity": lambda net, h: net.head(net.same(h.tanh())),
    "of halves": lambda net, h: net.head(torch.cat(net.halves(h), -1)),
}


def words(kind: str) -> Words:
    torch.manual_seed(0)
    net = Words(ENDS[kind])
    if kind == "tied module":
        net.tied = nn.Linear(D, V, bias=False)
        net.tied.weight = net.embed.weight
    if kind == "normed":
        net.normed = nn.utils.parametrizations.weight_norm(nn.Linear(D, V))
    if kind == "in a container":
        net.several = nn.Sequential(nn.Identity(), nn.Sequential(nn.Linear(D, V)))
    return net.double()


@pytest.mark.filterwarnings("ignore:no segment trains these parameters. head")
@pytest.mark.parametrize("kind", ENDS)
def test_the_head_of_a_vocabulary_and_what_is_below_it_get_their_true_gradients(kind: str) -> None:
    net = words(kind)
    learner = fb.attach(net, fb.DFA(), example=TOKENS)
    assert learner.source.name == "norm"
    learner(TOKENS).square().sum().backward()
    got = {n: None if p.grad is None else p.grad.clone() for n, p in net.named_parameters()}
    (edge,) = learner.graph.edges
    B = learner.feedback_of(edge).reshape(D, D)
    net.zero_grad()
    learner.detach()
    h = net.body[:2](net.embed(TOKENS))
    n = net.norm(net.body[2:](h.detach()))
    n.retain_grad()
    net.ends(net, n).square().sum().backward()
    # the body gets the error of what enters the head, through B; what is tied gets both
    h.backward(n.grad @ B)
    for name, p in net.named_parameters():
        torch.testing.assert_close(got[name], p.grad, msg=name)


def test_no_layer_but_that_of_the_scores_lies_above_the_source() -> None:
    """Nothing that a rule would feed is left to backprop."""

    def adapted(net: Words, h: Tensor) -> Tensor:
        return net.added(h)

    net = Words(adapted)
    net.added = Added(net.head)
    learner = fb.attach(net, fb.DFA(), example=TOKENS)
    assert learner.source.name == "added"
    assert [site.name for site in learner.sites][-2:] == ["norm", "added.down"]

    class Beside(Words):
        def forward(self, tokens: Tensor) -> Tensor:
            low = self.body(self.embed(tokens))
            return self.head(torch.cat([low, self.norm(self.above(low))], -1))

    net: Words = Beside()
    net.above, net.head = nn.Linear(D, D), nn.Linear(2 * D, 8 * D)
    assert fb.attach(net, fb.DFA(), example=TOKENS).source.name == "head"


@pytest.mark.parametrize(
    ("ends", "source"),
    [(lambda net, h: net.head(h[:, -1]), "head"), (lambda net, h: net.head(h)[:, -1], "output")],
)
def test_scores_of_the_last_token_alone_are_no_vocabulary(ends: Ends, source: str) -> None:
    """Their error is fed to all tokens; of what enters the head, the last token alone would get any."""
    assert fb.attach(Words(ends, 40), fb.DFA(), example=TOKENS).source.name == source


def test_a_norm_that_is_called_twice_is_no_source() -> None:
    net = Words(lambda net, h: net.head(net.norm(h)))
    assert fb.attach(net, fb.DFA(), example=TOKENS).source.name == "body.3"


@pytest.mark.parametrize(
    ("then", "where", "here"),
    [
        (fb.DKP(), "head", r"\[24, 6\] there, and \[6, 6\] here"),
        (fb.DKP(operator=fb.LowRank(2)), None, r"\[6, 2\] there"),
    ],
)
def test_feedback_of_another_form_or_error_is_not_loaded(
    then: fb.Rule, where: str | None, here: str
) -> None:
    saved = fb.attach(Words(), then, example=TOKENS, error_at=where).state_dict()
    learner = fb.attach(Words(), fb.DKP(), example=TOKENS)
    with pytest.raises(RuntimeError, match=here + r'(.|\n)*`error_at`(.|\n)*fb\.Dense\("zeros"\)'):
        learner.load_state_dict(saved)
    again = fb.attach(Words(), then, example=TOKENS, error_at=where)
    again.load_state_dict(saved)


@pytest.mark.filterwarnings("ignore:no segment trains these parameters. head")
@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_that_is_a_site_gets_the_errors_of_its_tokens(tied: bool) -> None:
    """Row v is the sum of e_t B over all places t that hold v, but for the padding's; a tied head adds its true gradient."""
    net = Words(lambda net, h: F.linear(h, net.embed.weight) if tied else net.head(h)).double()
    net.embed.padding_idx = 3
    tokens = TOKENS.clone()
    tokens[0, :2], tokens[1, 0] = 3, int(tokens[2, 4])
    learner = fb.attach(net, fb.DFA(), example=tokens, sites=["embed", "body.1"])
    assert learner.source.name == "norm"
    entered: list[Tensor] = []
    net.norm.register_forward_hook(lambda *call: entered.append(call[2].detach()))
    labels = torch.randint(V, (N, T))
    F.cross_entropy(learner(tokens).flatten(0, 1), labels.flatten()).backward()

    h = entered[-1].requires_grad_()
    head = (net.embed.weight if tied else net.head.weight).detach().requires_grad_()
    scores = F.linear(h, head, None if tied else net.head.bias.detach())
    F.cross_entropy(scores.flatten(0, 1), labels.flatten()).backward()
    assert h.grad is not None
    signals = h.grad @ learner.feedback.get_buffer("embed")
    there = tokens != 3
    rows = torch.zeros(V, D).double().index_add(0, tokens[there], signals[there])
    expected = rows + head.grad if tied else rows
    torch.testing.assert_close(net.embed.weight.grad, expected, rtol=1e-12, atol=1e-12)
