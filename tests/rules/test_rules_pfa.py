"""Product feedback alignment against naive loops, FA and Kolen-Pollack; learned layer-wise feedback compiled and accumulated."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from chains import F64, angle, awkward, chain_step, layer_of, step, weight_of
from pairs import CONV, MLP, Pair, assert_close, grads, loss_fn
from test_chain import LAYERS_2D
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import feedbackward as fb


def products(learner: fb.Learner) -> dict[str, Tensor]:
    """B R of each layer, entry by entry."""
    found = {}
    for edge in learner.graph.edges:
        R, B = (t.detach() for t in learner.weights_of(edge))
        form = edge.operator.layer.form
        W = torch.zeros(form.shape, dtype=R.dtype)
        groups, out, mid = B.shape
        for g in range(groups):
            for o in range(out):
                for k in range(mid):
                    if form.transposed:
                        into = slice(g * form.shape[0] // groups, (g + 1) * form.shape[0] // groups)
                        W[into, o] += B[g, o, k] * R[into, k]
                    else:
                        W[g * out + o] += B[g, o, k] * R[g * mid + k]
        found[layer_of(edge)] = W
    return found


@pytest.mark.parametrize("rule", [fb.rules.PFA(expand=3), fb.rules.PFA(kind="orthogonal")], ids=str)
@pytest.mark.parametrize("pair", [MLP, CONV], ids=str)
def test_pfa_sends_by_the_product_and_r_gets_b_times_the_gradient(
    pair: Pair, rule: fb.rules.PFA
) -> None:
    model = pair.model()
    learner = pair.attach(rule, model)
    got = step(learner, *pair.batch())
    expected = chain_step(pair, model, {k: v.numpy() for k, v in products(learner).items()})
    for name, gradient in expected.items():
        assert_close(got[name], gradient, name)
    for edge in learner.graph.edges:
        R, B = learner.weights_of(edge)
        assert not isinstance(B, nn.Parameter)
        gradient = torch.as_tensor(expected[edge.site.weight])
        groups, out, mid = B.shape
        naive = torch.zeros_like(R)
        for g in range(groups):
            for k in range(mid):
                naive[g * mid + k] = sum(B[g, o, k] * gradient[g * out + o] for o in range(out))
        assert_close(R.grad, naive, edge.site.name)


@pytest.mark.parametrize("name", LAYERS_2D)
def test_pfa_is_feedback_alignment_by_its_product(name: str) -> None:
    """On every kind of convolution; and its gradient is that of (delta a B)^T h, the layer-shaped product."""
    model, x = awkward(name)
    y = torch.arange(5)
    learner = fb.attach(model, fb.rules.PFA(expand=2), example=x)
    F.cross_entropy(learner(x), y).backward()
    got, product = grads(model), products(learner)
    for edge in learner.graph.edges:
        R, B = learner.weights_of(edge)
        by_groups = edge.operator._rows(model.get_parameter(edge.site.weight).grad)
        assert_close(edge.operator._rows(R.grad), B.mT @ by_groups, edge.site.name)
        assert_close(
            edge.operator.product(learner.weights_of(edge)), product[layer_of(edge)], "product"
        )
    learner.detach()
    model.zero_grad()
    plain = fb.attach(model, fb.FA(), example=x)
    for edge in plain.graph.edges:
        plain.feedback_of(edge).copy_(product[layer_of(edge)])
    F.cross_entropy(plain(x), y).backward()
    for key, gradient in grads(model).items():
        assert_close(got[key], gradient, key)


def test_pfa_with_the_identity_is_kolen_pollack() -> None:
    one, two = CONV.attach(fb.rules.PFA(kind="identity")), CONV.attach(fb.KolenPollack())
    for edge, other in zip(one.graph.edges, two.graph.edges, strict=True):
        with torch.no_grad():
            one.feedback_of(edge).copy_(two.feedback_of(other))
    got, expected = (step(learner, *CONV.batch()) for learner in (one, two))
    for name, gradient in expected.items():
        assert_close(got[name], gradient, name)
    for edge, other in zip(one.graph.edges, two.graph.edges, strict=True):
        assert_close(one.feedback_of(edge).grad, two.feedback_of(other).grad, edge.site.name)


def test_pfa_nears_the_direction_of_the_weights() -> None:
    """R - B^T W shrinks as (1 - lr decay)^t, so that B R tends to B B^T W: nearly W's direction, as B B^T is nearly 1."""
    model = CONV.model()
    learner = CONV.attach(fb.rules.PFA(expand=40), model)
    lr, decay, steps = 0.1, 0.05, 600
    optimizer = torch.optim.SGD(learner.parameters(), lr=lr, weight_decay=decay)
    x, y = CONV.batch()

    def difference(edge: fb.Edge) -> Tensor:
        R, B = learner.weights_of(edge)
        rows = edge.operator._rows
        return (rows(R) - B.mT @ rows(weight_of(learner, edge))).detach()

    start = {edge: difference(edge) for edge in learner.graph.edges}
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(y)(learner(x)).backward()
        optimizer.step()
    for edge, before in start.items():
        torch.testing.assert_close(
            difference(edge), before * (1 - lr * decay) ** steps, rtol=1e-9, atol=1e-11
        )
    for edge in learner.graph.edges:
        B = learner.weights_of(edge)[1]
        assert angle(products(learner)[layer_of(edge)], weight_of(learner, edge).detach()) < 20
        eye = torch.eye(B.shape[1], dtype=F64)
        assert (B @ B.mT - eye).abs().max() < 0.5


def test_pfa_forms_no_second_sum_over_the_batch() -> None:
    """Beyond FA's work: the wider backward product, and B^T times W's gradient, whatever the batch."""
    extra = []
    for size in (10, 20):
        x, y = torch.randn(size, 6), torch.arange(size) % 3
        flops = {}
        for rule in (fb.FA(), fb.rules.PFA(expand=2)):
            torch.manual_seed(0)
            learner = fb.attach(
                nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), rule, example=x
            )
            with FlopCounterMode(display=False) as counter:
                F.cross_entropy(learner(x), y).backward()
            flops[rule.name] = counter.get_total_flops()
        mid = 6
        send = size * (3 * mid + mid * 5 - 3 * 5)
        extra.append((flops["pfa"] - flops["fa"]) / 2 - send)
    assert extra == [3 * 6 * 5] * 2


@pytest.mark.single
@pytest.mark.parametrize(
    "rule",
    [fb.rules.PFA(expand=2), fb.rules.InformationAlignment(standardize=False)],
    ids=["pfa", "ia"],
)
def test_accumulation_state_and_compile(rule: fb.Rule) -> None:
    torch._dynamo.reset()
    learner = CONV.attach(rule)
    learner.model.eval()  # batch norm sees the same
    x, y = CONV.batch()
    step(learner, x, y)
    whole = {name: p.grad.clone() for name, p in learner.named_parameters()}
    learner.zero_grad()
    loss_fn(y)(torch.compile(learner, backend="aot_eager", fullgraph=True)(x)).backward()
    for name, p in learner.named_parameters():
        assert_close(p.grad, whole[name], name)
    learner.zero_grad()
    for part in (slice(0, 2), slice(2, 4)):
        (loss_fn(y[part])(learner(x[part])) / 2).backward()
    scale = (
        1 if isinstance(rule, fb.rules.PFA) else 2
    )  # the regulariser is not scaled with the loss
    for name, p in learner.named_parameters():
        factor = scale if name.startswith("feedback") else 1
        assert_close(p.grad, factor * whole[name], name)
    other = CONV.attach(rule, CONV.model(seed=3), seed=4)
    other.load_state_dict(learner.state_dict())
    other.model.eval()
    step(other, x, y)
    for name, p in other.named_parameters():
        assert_close(p.grad, whole[name], name, tolerance=1e-12)


def test_pfa_refuses_what_it_does_not_know() -> None:
    with pytest.raises(fb.AttachError, match="expand >= 1"):
        fb.rules.PFA(expand=0)
    with pytest.raises(fb.AttachError, match="random, orthogonal, identity, got 10 and 'normal'"):
        fb.rules.PFA(kind="normal")


@pytest.mark.parametrize(
    "name",
    ["usf", "brsf", "frsf", "weight_mirror", "pfa", "information_alignment", "activation_alignment", "symmetric_alignment"],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_autocast_and_stored_in_bfloat16(name: str, dtype: torch.dtype | None) -> None:
    """Also where somebody calls backward within autocast, on a layer whose padding autocast treats by itself."""
    model, x = awkward("reflect")
    learner = fb.attach(model.float(), fb.RULES[name](), example=x.float(), feedback_dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        F.cross_entropy(learner(x.float()).float(), torch.arange(5)).backward()
        if learner.attached.in_phase:
            learner.feedback_step(x.float())
    for key, p in learner.named_parameters():
        assert p.grad is not None, key
        assert p.grad.dtype == p.dtype
        assert p.grad.isfinite().all(), key
