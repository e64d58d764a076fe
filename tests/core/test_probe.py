"""The probe's numbers against independent computations, and that it leaves nothing behind."""

from __future__ import annotations

import copy
import json
import math
import random
from typing import Any

import pytest
import torch
from pairs import (
    CONV,
    F64,
    HIDDEN,
    MLP,
    PAIRS,
    TOKENS,
    VIT,
    Pair,
    exact_grads,
    grads,
    loss_fn,
    signals,
)
from rows import DIRECT, LEARNED, ROWS, Row
from torch import Tensor, nn

import feedbackward as fb


def cosine(a: Tensor, b: Tensor) -> float:
    """From its definition, on nested lists of numbers."""
    a, b = a.flatten().tolist(), b.flatten().tolist()
    dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(math.fsum(x * x for x in a)) / math.sqrt(math.fsum(y * y for y in b))


def norm(a: Tensor) -> float:
    return math.sqrt(math.fsum(x * x for x in a.flatten().tolist()))


def same_signs(rule: Tensor, bp: Tensor) -> float:
    pairs = [
        (x, y)
        for x, y in zip(rule.flatten().tolist(), bp.flatten().tolist(), strict=True)
        if y != 0
    ]
    return sum((x > 0) == (y > 0) and (x < 0) == (y < 0) for x, y in pairs) / len(pairs)


def both(pair: Pair, learner: fb.Learner, x: Tensor, y: Tensor) -> tuple[dict, dict, dict, dict]:
    """Signals and gradients of the rule and of backprop, from two plain steps."""
    learner.zero_grad()
    rule_signals = signals(learner, x, y)
    rule_grads = grads(learner.model)
    learner.zero_grad()
    with learner.exact():
        bp_signals = signals(learner, x, y)
    return rule_signals, rule_grads, bp_signals, grads(learner.model)


@pytest.mark.parametrize("row", DIRECT, ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_measures_of_signals_and_gradients(pair: Pair, row: Row) -> None:
    learner, (x, y) = pair.attach(row.rule), pair.batch()
    found = fb.probe(learner, loss_fn(y), x)
    rule_signals, rule_grads, bp_signals, bp_grads = both(pair, learner, x, y)
    assert tuple(found.sites) == pair.cuts
    for name, got in found.sites.items():
        rule, bp = rule_signals[name], bp_signals[name]
        expected = math.fsum(cosine(r, b) for r, b in zip(rule, bp, strict=True)) / len(x)
        assert got.cosine == pytest.approx(expected, abs=1e-12)
        assert got.angle == pytest.approx(math.acos(expected) * 180 / math.pi, abs=1e-9)
        assert got.norm_ratio == pytest.approx(norm(rule) / norm(bp), rel=1e-12)
        assert got.sign_agreement == pytest.approx(same_signs(rule, bp), abs=1e-12)
        assert got.bp_norm == pytest.approx(norm(bp), rel=1e-12)
    assert list(found.parameters) == list(bp_grads)
    for name, got in found.parameters.items():
        rule, bp = rule_grads[name], bp_grads[name]
        if norm(bp) < 1e-12:  # a bias before batch norm: the probe shows the floor itself
            assert got.bp_norm < 1e-12
            continue
        assert got.cosine == pytest.approx(cosine(rule, bp), abs=1e-10)
        assert got.angle == pytest.approx(
            math.degrees(math.acos(max(-1, min(1, cosine(rule, bp))))), abs=1e-4
        )
        assert got.norm_ratio == pytest.approx(norm(rule) / norm(bp), rel=1e-10)
        assert got.sign_agreement == pytest.approx(same_signs(rule, bp), abs=1e-12)
        assert got.bp_norm == pytest.approx(norm(bp), rel=1e-10)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_backprop_agrees_with_itself(pair: Pair) -> None:
    learner, (x, y) = pair.attach(fb.BP()), pair.batch()
    found = fb.probe(learner, loss_fn(y), x)
    for got in [*found.sites.values(), *found.parameters.values()]:
        if got.bp_norm > 1e-12:
            assert got.cosine == pytest.approx(1, abs=1e-12)
            assert got.norm_ratio == pytest.approx(1, abs=1e-12)
            assert got.sign_agreement == 1


def test_frozen_layers_have_no_cosine_and_the_head_has_one() -> None:
    learner, (x, y) = MLP.attach(fb.Frozen()), MLP.batch()
    found = fb.probe(learner, loss_fn(y), x)
    assert [math.isnan(got.cosine) for got in found.sites.values()] == [True, True, True]
    assert found.parameters["head.weight"].cosine == pytest.approx(1, abs=1e-12)
    assert math.isnan(found.parameters["fc1.weight"].cosine)
    assert found.parameters["fc1.weight"].norm_ratio == 0
    assert found.parameters["fc1.weight"].bp_norm > 0
    plain = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert plain["parameters"]["fc1.weight"]["cosine"] is None
    assert plain["parameters"]["head.weight"]["cosine"] == pytest.approx(1)


def mean_jacobians(pair: Pair, learner: fb.Learner, x: Tensor) -> dict[str, Tensor]:
    """E[dsource/dh] by running what lies between site and source on its own. Nets without batch statistics only."""
    children = dict(learner.model.named_children())
    names = list(children)
    last = names.index(pair.error_at or "head")
    found, h = {}, x
    for i, name in enumerate(names[: last + 1]):
        h = children[name](h).detach()
        if name in pair.cuts:
            above = nn.Sequential(*[children[n] for n in names[i + 1 : last + 1]])
            rows = [torch.autograd.functional.jacobian(above, sample[None]) for sample in h]
            found[name] = torch.stack([row.reshape(-1, *h.shape[1:]) for row in rows]).mean(0)
    return found


@pytest.mark.parametrize("row", LEARNED, ids=str)
@pytest.mark.parametrize("pair", [MLP, HIDDEN, VIT], ids=str)
def test_feedback_beside_the_mean_jacobian(pair: Pair, row: Row) -> None:
    learner, (x, y) = pair.attach(row.rule), pair.batch()
    expected = mean_jacobians(pair, learner, x)
    found = fb.probe(learner, loss_fn(y), x)
    for edge in learner.graph.edges:
        B, J = learner.feedback_of(edge), expected[edge.site.name]
        assert B.shape == J.shape
        assert found.sites[edge.site.name].jacobian_cosine == pytest.approx(
            cosine(B.detach(), J), abs=1e-12
        )
        with torch.no_grad():
            B.copy_(3 * J)
    found = fb.probe(learner, loss_fn(y), x)
    assert [got.jacobian_cosine for got in found.sites.values()] == pytest.approx(
        [1.0] * len(pair.cuts), abs=1e-12
    )


def test_mean_jacobian_through_batch_norm() -> None:
    """With batch statistics a sample's output depends on the others: the mean over the batch of d(sum_n a_nc)/dh_n."""
    learner, (x, y) = CONV.attach(fb.DKP.published()), CONV.batch()
    met: dict[str, Tensor] = {}
    with learner.exact():
        handle = learner.model.pool1.register_forward_hook(lambda m, a, out: met.update(h=out))
        logits = learner(x)
        handle.remove()
    J = torch.stack(
        [
            torch.autograd.grad(logits[:, c].sum(), met["h"], retain_graph=True)[0].mean(0)
            for c in range(3)
        ]
    )
    got = fb.probe(learner, loss_fn(y), x).sites["pool1"].jacobian_cosine
    assert got == pytest.approx(cosine(learner.feedback.pool1.detach(), J), abs=1e-12)


def test_a_number_compares_so_many_rows_of_the_jacobian() -> None:
    """Two of three rows are 0 and 1; more than there are is all of them; fixed feedback too, as it was asked for."""
    learner, (x, y) = CONV.attach(fb.DFA()), CONV.batch()
    expected = mean_jacobians(CONV, learner.eval(), x)
    for rows, chosen in ((2, [0, 1]), (1, [0]), (50, [0, 1, 2])):
        found = fb.probe(learner, loss_fn(y), x, jacobian=rows)
        for edge in learner.graph.edges:
            B, J = learner.feedback_of(edge)[chosen], expected[edge.site.name][chosen]
            assert found.sites[edge.site.name].jacobian_cosine == pytest.approx(
                cosine(B, J), abs=1e-12
            )


@pytest.mark.parametrize("pair", [MLP, HIDDEN, CONV], ids=str)
def test_readout_alignment(pair: Pair) -> None:
    """mean_n cos(a_L[n], h_l[n] B_l^T), the source in the place of a_L."""
    learner, (x, y) = pair.attach(fb.DKP.published()), pair.batch()
    found = fb.probe(learner, loss_fn(y), x)
    activities, h = {}, x
    for name, module in learner.model.named_children():
        activities[name] = h = module(h).detach()
    source = activities[pair.error_at or "head"]
    for edge in learner.graph.edges:
        B, h = learner.feedback_of(edge).detach(), activities[edge.site.name]
        readout = torch.stack(
            [torch.stack([(B[c] * h[n]).sum() for c in range(len(B))]) for n in range(len(h))]
        )
        expected = math.fsum(cosine(r, a) for r, a in zip(readout, source, strict=True)) / len(x)
        assert found.sites[edge.site.name].readout == pytest.approx(expected, abs=1e-12)
    with torch.no_grad():  # without its bias the head is that readout of the last site
        learner.model.head.bias.zero_()
        last = learner.feedback_of(learner.graph.edges[-1])
        if pair.error_at is None:
            last.copy_(learner.model.head.weight)
            assert fb.probe(learner, loss_fn(y), x).sites[pair.cuts[-1]].readout == pytest.approx(
                1, abs=1e-12
            )


def test_when_feedback_is_compared_with_the_jacobian() -> None:
    """Learned feedback by default, fixed feedback if asked, never where tokens share it; huge outputs only if asked."""
    x, y = MLP.batch()

    def compared(
        learner: fb.Learner, x: Tensor, y: Tensor, **options: bool
    ) -> set[tuple[bool, bool]]:
        sites = fb.probe(learner, loss_fn(y), x, **options).sites.values()
        return {(got.jacobian_cosine is not None, got.readout is not None) for got in sites}

    assert compared(MLP.attach(fb.DKP.published()), x, y) == {(True, True)}
    assert compared(MLP.attach(fb.DKP.published()), x, y, jacobian=False) == {(False, False)}
    assert compared(MLP.attach(fb.DFA()), x, y) == {(False, False)}
    assert compared(MLP.attach(fb.DFA()), x, y, jacobian=True) == {(True, True)}
    assert compared(TOKENS.attach(fb.DKP.published()), *TOKENS.batch(), jacobian=True) == {
        (False, False)
    }
    wide = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 300)).to(F64)
    learner = fb.attach(wide, fb.DKP.published(), example=x)
    assert compared(learner, x, y) == {(False, True)}
    assert compared(learner, x, y, jacobian=True) == {(True, True)}


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_no_side_effects(row: Row, training: bool) -> None:
    model = CONV.model()
    learner, (x, y) = CONV.attach(row.rule, model), CONV.batch()
    # a training pass puts the learner's own hooks behind it
    model.head.register_forward_hook(lambda m, a, out: None)
    signals(learner, x, y)
    learner.train(training)
    learner.model.bn2.eval()  # a mode of its own
    hooks = {
        name: (list(m._forward_hooks), list(m._forward_pre_hooks))
        for name, m in model.named_modules()
    }
    before, gradients = copy.deepcopy(learner.state_dict()), grads(learner)
    buffers = {name: id(b) for name, b in learner.named_buffers()}
    modes = [m.training for m in learner.modules()]
    random.seed(4)
    states = torch.get_rng_state(), random.getstate()

    def noisy(output: Tensor) -> Tensor:
        return loss_fn(y)(output + torch.randn_like(output) * random.random())

    with torch.no_grad():
        first = fb.probe(learner, noisy, x)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert all(torch.equal(value, before[key]) for key, value in learner.state_dict().items())
    assert {name: id(b) for name, b in learner.named_buffers()} == buffers
    for name, gradient in grads(learner).items():
        assert (gradient is None and gradients[name] is None) or torch.equal(
            gradient, gradients[name]
        )
    assert [m.training for m in learner.modules()] == modes
    assert {
        name: (list(m._forward_hooks), list(m._forward_pre_hooks))
        for name, m in model.named_modules()
    } == hooks
    assert repr(fb.probe(learner, noisy, x)) == repr(first)


@pytest.mark.parametrize("before", [True, False])
def test_what_a_hook_makes_of_an_activity_is_what_is_compared(before: bool) -> None:
    """The cut, and the gradient that is sent to it, are of what the user's hook returns."""
    model, met = CONV.model(), dict[str, Tensor]()
    x, y = CONV.batch()

    def double(m: nn.Module, args: Any, out: Tensor) -> Tensor:
        met["h"] = 2 * out
        return met["h"]

    if before:
        model.pool1.register_forward_hook(double)
    learner = CONV.attach(fb.DFA(), model)
    if not before:
        model.pool1.register_forward_hook(double)
    with learner.exact():
        (expected,) = torch.autograd.grad(loss_fn(y)(learner(x)), met["h"])
    found = fb.probe(learner, loss_fn(y), x).sites["pool1"]
    assert found.bp_norm == pytest.approx(expected.norm().item(), rel=1e-9)
    edge = next(e for e in learner.graph.edges if e.site.name == "pool1")
    with torch.no_grad():
        e = (learner(x).softmax(1) - nn.functional.one_hot(y, 3)) / len(x)
        sent = e @ learner.feedback_of(edge).flatten(1)
    assert found.norm_ratio == pytest.approx((sent.norm() / expected.norm()).item(), rel=1e-9)


def test_nothing_is_left_behind_by_a_probe_that_fails() -> None:
    learner, (x, y) = CONV.attach(fb.DKP.published()), CONV.batch()
    before = copy.deepcopy(learner.state_dict())
    hooks = sum(len(m._forward_hooks) for m in learner.modules())
    with pytest.raises(fb.FeedbackError, match="one number"):
        fb.probe(learner, lambda output: output, x)
    assert all(torch.equal(value, before[key]) for key, value in learner.state_dict().items())
    assert sum(len(m._forward_hooks) for m in learner.modules()) == hooks
    assert not math.isnan(fb.probe(learner, loss_fn(y), x).sites["pool1"].cosine)


def test_both_passes_draw_the_same_dropout_masks() -> None:
    """With the same masks a linear net is linear in them: the path product through the mask is backprop's signal."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 5), nn.Linear(5, 3)).to(
        F64
    )
    x, y = torch.randn(5, 6, dtype=F64), torch.randint(3, (5,))
    learner = fb.attach(model, fb.DFA(), example=x)
    assert [site.name for site in learner.sites] == ["1", "2"]
    learner.feedback_of(learner.graph.edges[0]).copy_((model[3].weight @ model[2].weight).detach())
    learner.feedback_of(learner.graph.edges[1]).copy_(model[3].weight.detach())
    found = fb.probe(learner, loss_fn(y), x)
    for got in [*found.sites.values(), *found.parameters.values()]:
        assert got.cosine == pytest.approx(1, abs=1e-12)
        assert got.norm_ratio == pytest.approx(1, abs=1e-12)


def test_segments_with_nothing_to_train_have_no_signal() -> None:
    """Frozen layers in the middle and at the bottom."""
    for name in ("fc1", "fc2"):
        model = MLP.model()
        model.get_submodule(name).requires_grad_(False)
        learner, (x, y) = MLP.attach(fb.DKP.published(), model), MLP.batch()
        found = fb.probe(learner, loss_fn(y), x)
        assert not [key for key in found.parameters if key.startswith(name)]
        assert math.isfinite(found.sites["act3"].cosine)
        assert name == "fc1" or math.isnan(found.sites["act2"].cosine)


def test_in_place_activation_after_the_source() -> None:
    """The source is the pre-activation, also where the activation overwrites it."""
    layers = [nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)]
    torch.manual_seed(0)
    plain = nn.Sequential(*layers).to(F64)
    in_place = copy.deepcopy(plain)
    in_place[3].inplace = True
    x, y = MLP.batch()
    results = [
        fb.probe(fb.attach(m, fb.DKP.published(), example=x, error_at="2"), loss_fn(y), x)
        for m in (plain, in_place)
    ]
    assert results[0].as_dict() == results[1].as_dict()


def test_the_table_shows_every_site_and_parameter() -> None:
    learner, (x, y) = MLP.attach(fb.DKP.published()), MLP.batch()
    text = str(fb.probe(learner, loss_fn(y), x))
    assert all(name in text for name in [*MLP.cuts, *exact_grads(learner.model, x, y), "readout"])


def test_the_matrix_that_feedback_stands_for_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """With many source units it may be far larger than the feedback."""
    x, sent = torch.randn(4, 6), []
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 300))
    learner = fb.attach(model, fb.DKP.published(), example=x)
    plain = fb.Dense.send

    def send(
        self: fb.Dense, weights: tuple[Tensor, ...], d: Tensor, site: tuple[int, ...]
    ) -> Tensor:
        sent.append(len(d))
        return plain(self, weights, d, site)

    monkeypatch.setattr(fb.Dense, "send", send)
    (found,) = fb.probe(learner, lambda out: out.square().sum(), x).sites.values()
    assert max(sent) == len(x)
    h, (edge,) = model[:2](x), learner.graph.edges
    readout = h @ learner.feedback_of(edge).t()
    expected = nn.functional.cosine_similarity(readout, model(x)).mean()
    assert found.readout == pytest.approx(expected.item(), abs=1e-5)
