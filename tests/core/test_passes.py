"""Forward and backward passes that differ from the example: right, or refused with a clear sentence."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch import Tensor, nn
from wired import Net, X, two_layers

import feedbackward as fb

# --- passes that are not as on the example ------------------------------------------------------------------------


def test_a_skipped_site_is_refused() -> None:
    model = two_layers(
        lambda m, x: m.out(m.act(m.b(h)) if m.deep else (h)) if (h := m.a(x)) is not None else h
    )
    model.add_module("act", nn.ReLU())
    model.deep = True
    for rule in (fb.DFA(), fb.DKP.published(), fb.Frozen()):
        model.deep = True
        learner = fb.attach(model, rule, example=X, sites=["a", "act"])
        model.deep = False
        with pytest.raises(fb.SiteError, match=r"'act' was not reached .*name other sites"):
            learner(X)
        with learner.exact():
            learner(X)
        learner.detach()


def test_a_skipped_source_is_refused() -> None:
    model = two_layers(
        lambda m, x: (
            m.out(m.b(h)[:, :8] if m.deep else h) if (h := m.act(m.a(x))) is not None else h
        )
    )
    model.add_module("act", nn.ReLU())
    model.deep = True
    learner = fb.attach(model, fb.DFA(), example=X, sites=["act"], error_at="b")
    model.deep = False
    with pytest.raises(fb.SiteError, match=r"'b' was not reached"):
        learner(X)


@pytest.mark.parametrize("sites", ["layers", ["act"]])
def test_a_module_that_runs_more_often_is_refused(sites) -> None:
    def wiring(m: Net, x: Tensor) -> Tensor:
        x = m.a(x)
        for _ in range(m.depth):
            x = m.b(m.act(x))
        return m.out(x)

    model = two_layers(wiring, act=nn.ReLU())
    model.depth = 1
    learner = fb.attach(model, fb.DFA(), example=X, sites=sites)
    model.depth = 2
    with pytest.raises(fb.SiteError, match=r"Attach again with an example of"):
        learner(X)
    (site,) = fb.attach(model, fb.DFA(), example=X, sites=["act"]).sites
    assert site.every


def test_a_source_that_is_reached_twice_is_refused() -> None:
    def wiring(m: Net, x: Tensor) -> Tensor:
        h = m.b(m.act(m.a(x)))
        return m.out(m.b(h) if m.again else h)

    model = two_layers(wiring, act=nn.ReLU())
    model.again = False
    learner = fb.attach(model, fb.DFA(), example=X, sites=["act"], error_at="b")
    model.again = True
    with pytest.raises(fb.SiteError, match=r"source 'b' was reached twice"):
        learner(X)


def test_another_input_size_names_the_site_and_the_fix() -> None:
    model, example = zoo.build(zoo.case("group_norms"))
    learner = fb.attach(model, fb.DFA(), example=example)
    learner(torch.randn(2, 2, 8, 8))  # another batch is fine
    with pytest.raises(
        fb.SiteError, match=r"'3' got .*\[5, 4, 5, 5\].*\[4, 4, 4\].*fits no others: resize"
    ):
        learner(torch.randn(5, 2, 10, 10))


def test_buffers_that_a_pass_replaces_are_put_back() -> None:
    """Attach runs the model, and a counter that each pass assigns anew must not have counted that."""

    def wiring(m: Net, x: Tensor) -> Tensor:
        m.count = m.count + 1
        return m.out(m.b(m.a(x).relu()).relu())

    model = two_layers(wiring)
    model.register_buffer("count", torch.zeros(()))
    learner = fb.attach(model, fb.DFA(), example=X)
    assert model.count == 0
    learner(X)
    assert model.count == 1


def test_inputs_that_require_a_gradient_are_refused() -> None:
    model, example = zoo.build(zoo.case("mlp"))
    learner = fb.attach(model, fb.DFA(), example=example)
    x = example.clone().requires_grad_()
    with pytest.raises(fb.AttachError, match=r"input requires a gradient.*learner\.exact\(\)"):
        learner(x)
    with learner.exact():
        learner(x).sum().backward()
    assert x.grad is not None


def test_second_derivatives_are_refused() -> None:
    model, example = zoo.build(zoo.case("tokens"))
    learner = fb.attach(model, fb.DFA(), example=example)
    first = torch.autograd.grad(
        learner(example).square().sum(), list(model.parameters()), create_graph=True
    )
    with pytest.raises(RuntimeError, match=r"once_differentiable"):
        sum(g.square().sum() for g in first).backward()


# --- tokens and batch ---------------------------------------------------------------------------------------------


def test_sequence_first_models() -> None:
    """[T, N, D] in and out: every position of source and site has its own error, so nothing depends on the order.
    With one output per sample the batch cannot be told from the tokens: refused."""
    lstm = Net(
        lambda m, x: m.out(m.fc(m.lstm(x)[0]).tanh()),
        lstm=nn.LSTM(6, 7),
        fc=nn.Linear(7, 8),
        out=nn.Linear(8, 3),
    )
    learner = fb.attach(lstm, fb.DKP.published(), example=torch.randn(4, 5, 6), sites=["fc"])
    assert [(e.leading, e.site_shape, e.source_size) for e in learner.graph.edges] == [(2, (8,), 3)]
    learner(torch.randn(9, 2, 6)).sum().backward()
    with pytest.raises(fb.AttachError, match=r"whose batch size differs from its sequence length"):
        fb.attach(lstm, fb.DKP.published(), example=torch.randn(5, 5, 6))
    last = Net(
        lambda m, x: m.out(m.fc(m.lstm(x)[0])[-1]),
        lstm=nn.LSTM(6, 7),
        fc=nn.Linear(7, 8),
        out=nn.Linear(8, 3),
    )
    with pytest.raises(fb.SiteError, match=r"the batch must come first"):
        fb.attach(last, fb.DKP.published(), example=torch.randn(4, 5, 6), sites=["fc"])
    with pytest.raises(fb.AttachError, match=r"whose batch size differs"):
        fb.attach(last, fb.DKP.published(), example=torch.randn(5, 5, 6), sites=["fc"])


def test_batch_size_equal_to_another_dimension() -> None:
    """Tokens are told from features by the layers, never by equal sizes."""
    for shape in ((6, 6, 6), (4, 4, 6), (5, 3, 6)):
        learner = fb.attach(zoo.tokens(), fb.DKP.published(), example=torch.randn(shape))
        assert [(e.leading, e.site_shape, e.source_size) for e in learner.graph.edges] == [
            (2, (8,), 3),
            (2, (7,), 3),
        ]
    model = nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv1d(4, 4, 3, padding=1))
    (edge,) = fb.attach(model, fb.DKP.published(), example=torch.randn(4, 4, 4)).graph.edges
    assert (edge.leading, edge.site_shape, edge.source_size) == (1, (4, 4), 16)


def test_a_batch_of_one() -> None:
    model, example = zoo.build(zoo.case("tokens"))
    fb.attach(model, fb.DKP.published(), example=example)(example[:1]).sum().backward()
    fb.attach(zoo.tokens(), fb.DKP.published(center=True), example=example)(
        example[:1]
    ).sum().backward()  # many tokens
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    centred = fb.attach(net, fb.DKP.published(center=True), example=torch.randn(3, 4))
    with pytest.raises(fb.SiteError, match=r"batch of at least 2, got 1.*Drop the last"):
        centred(torch.randn(1, 4))


def test_sizes_are_checked_in_every_pass() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))  # fmt: skip
    learner = fb.attach(model, fb.DFA(), example=torch.zeros(2, 1, 8, 8), sites=["1"])
    for _ in range(2):
        learner(torch.randn(2, 1, 8, 8)).sum().backward()
        with pytest.raises(fb.SiteError, match="fits no others"):
            learner(torch.randn(2, 1, 11, 9))
