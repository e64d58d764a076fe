"""Feedback operators within a learner: signals, steps, storage, sizes, compiled passes."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict

import pytest
import torch
from pairs import BEFORE_POOL, CONV, F64, MLP, TOKENS, Pair, assert_close, loss_fn, signals
from torch import Tensor, nn

import feedbackward as fb
from feedbackward.experiment import nets
from feedbackward.experiment.training.building import make_operator, make_rule

MAPS = fb.PerShape(maps=fb.Pooled(), vectors=fb.Dense())
PATCHES = fb.PerShape(maps=fb.Pooled(2), vectors=fb.Sparse(2))
KERNELS = fb.PerShape(maps=fb.operators.Kernel(), vectors=fb.operators.Shared())
LEARNED = (fb.operators.Shared(), fb.Sparse(1), fb.Sparse(2), fb.LowRank(2), MAPS, PATCHES, KERNELS)
FIXED = (fb.operators.Binary(), fb.operators.Seeded(), fb.operators.Seeded(distribution="binary"))
RULES = [fb.DFA(operator=o) for o in (*LEARNED, *FIXED)] + [
    fb.DKP.published(center=True, operator=o) for o in LEARNED
]


def matrices(learner: fb.Learner) -> dict[str, Tensor]:
    """The dense matrix of every edge, [C, n]: what it sends for unit errors."""
    found = {}
    for edge in learner.graph.edges:
        unit = torch.eye(edge.source_size, dtype=F64).reshape(-1, *edge.source_shape)
        weights = (w.detach() for w in learner.weights_of(edge))
        cast = tuple(w.double() if w.is_floating_point() else w for w in weights)
        found[edge.site.name] = edge.operator.send(cast, unit, edge.site_shape).flatten(1)
    return found


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("pair", [MLP, BEFORE_POOL, TOKENS], ids=str)
def test_signals_are_the_error_times_the_dense_matrix(pair: Pair, rule: fb.Rule) -> None:
    learner, (x, y) = pair.attach(rule), pair.batch()
    got = signals(learner, x, y)
    output = learner.model(x).detach().requires_grad_()
    (e,) = torch.autograd.grad(loss_fn(y)(output), output)
    for edge in learner.graph.edges:
        expected = e.flatten(0, edge.leading - 1).flatten(1) @ matrices(learner)[edge.site.name]
        signal = got[edge.site.name]
        assert signal is not None
        assert_close(signal, expected.reshape(signal.shape), edge.site.name)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("pair", [MLP, CONV], ids=str)
def test_one_step(pair: Pair, rule: fb.Rule) -> None:
    """Every hidden layer and every learned weight moves; indices and other fixed weights do not."""
    learner, (x, y) = pair.attach(rule), pair.batch(8)
    before = {name: t.clone() for name, t in learner.state_dict().items()}
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    loss_fn(y)(learner(x)).backward()
    for name, p in learner.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        if not name.endswith(("conv1.bias", "conv2.bias")):  # whose gradient batch norm takes away
            assert p.grad.abs().max() > 0, name
    optimizer.step()
    for name, buffer in learner.feedback.named_buffers():
        assert torch.equal(buffer, before[f"feedback.{name}"])
    assert bool(list(learner.feedback.parameters())) == isinstance(rule, fb.DKP)


@pytest.mark.parametrize("operator", FIXED, ids=str)
def test_fixed_forms_cannot_be_learned(operator: fb.Operator) -> None:
    name = type(operator).__name__
    with pytest.raises(
        fb.AttachError, match=rf"DKP learns.*{name} feedback cannot be learned.*DFA"
    ):
        MLP.attach(fb.DKP.published(operator=operator))


def test_refusals_name_the_site() -> None:
    with pytest.raises(
        fb.AttachError, match=r"site 'act3': Pooled feedback is constant over space"
    ):
        CONV.attach(fb.DFA(operator=fb.Pooled()), sites=["pool1", "act3"])


@pytest.mark.parametrize(
    "operator",
    [
        fb.PerShape(maps=fb.Dense("zeros"), vectors=fb.Dense()),
        fb.PerShape(maps=fb.Dense(), vectors=fb.Sparse(scale=0)),
        fb.LowRank(2, "zeros"),
        fb.operators.Kernel(scale=0.0),
    ],
    ids=str,
)
def test_fixed_feedback_that_is_zero_is_refused(operator: fb.Operator) -> None:
    with pytest.raises(fb.AttachError, match="zero feedback"):
        fb.DFA(operator=operator)
    fb.DKP.published(operator=operator)


# --- shared ----------------------------------------------------------------------------------------------------


def mixed_tokens() -> nn.Sequential:
    """A site without tokens below a token-wise one, under a token-wise output."""
    return nn.Sequential(
        OrderedDict(
            flat=nn.Flatten(), fc0=nn.Linear(15, 30), act0=nn.ReLU(), split=nn.Unflatten(1, (5, 6)),
            fc1=nn.Linear(6, 4), act1=nn.ReLU(), fc2=nn.Linear(4, 6), act2=nn.Tanh(), head=nn.Linear(6, 7),
        )
    )  # fmt: skip


MIXED = Pair(
    "mixed-tokens",
    mixed_tokens,
    (5, 3),
    (5,),
    7,
    ("act0", "act1", "act2"),
    sites=["act0", "act1", "act2"],
)


def test_shared_feedback_is_one_matrix_for_each_shape_of_source() -> None:
    learner, (x, y) = MIXED.attach(fb.DKP.published(operator=fb.operators.Shared())), MIXED.batch()
    weights = dict(learner.feedback.named_parameters())
    assert {name: tuple(B.shape) for name, B in weights.items()} == {
        "Shared/5x7": (35, 30),
        "Shared/7": (7, 6),
    }
    dense = matrices(learner)
    assert torch.equal(dense["act1"], dense["act2"][:, :4])
    h: dict[str, Tensor] = {}
    for name in MIXED.cuts:
        learner.model.get_submodule(name).register_forward_hook(
            lambda m, a, out, name=name: h.update({name: out.detach()})
        )
    output = learner.model(x).detach().requires_grad_()
    (e,) = torch.autograd.grad(loss_fn(y)(output), output)
    loss_fn(y)(learner(x)).backward()
    rows = e.flatten(0, 1)
    two = rows.t() @ h["act2"].flatten(0, 1)
    two[:, :4] += rows.t() @ h["act1"].flatten(0, 1)
    assert_close(weights["Shared/7"].grad, two)
    assert_close(weights["Shared/5x7"].grad, e.flatten(1).t() @ h["act0"])


def test_shared_feedback_within_per_shape_is_common_to_the_vectors() -> None:
    learner = MLP.attach(
        fb.DFA(operator=fb.PerShape(maps=fb.Dense(), vectors=fb.operators.Shared()))
    )
    assert [name for name, _ in learner.feedback.named_buffers()] == ["Shared/3"]
    assert learner.feedback_bytes == 3 * 6 * 8


# --- storage ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_state_round_trip(rule: fb.Rule) -> None:
    """Into a learner of another seed; seeded feedback is not in the state, so it needs the same seed."""
    x, y = CONV.batch()
    learner = CONV.attach(rule, seed=1)
    stores = bool(list(learner.feedback.state_dict()))
    other = CONV.attach(rule, model=CONV.model(seed=3), seed=2 if stores else 1)
    assert stores != isinstance(getattr(rule, "operator", None), fb.operators.Seeded)
    before = signals(other, x, y)
    other.load_state_dict(copy.deepcopy(learner.state_dict()))
    expected = signals(learner, x, y)
    for name, signal in signals(other, x, y).items():
        assert torch.equal(signal, expected[name])  # type: ignore[arg-type]
        assert not torch.equal(before[name], expected[name])  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_stored_in_bfloat16(rule: fb.Rule) -> None:
    """Floating-point weights take half the bytes of float32, others stay as they are; signals are those of the weights."""
    model, x, y = CONV.model().float(), CONV.batch()[0].float(), CONV.batch()[1]
    full = fb.attach(copy.deepcopy(model), rule, example=x)
    half = fb.attach(model, rule, example=x, feedback_dtype=torch.bfloat16)
    for name, weight in full.feedback.state_dict().items():
        stored = half.feedback.state_dict()[name]
        assert torch.equal(stored, weight.bfloat16() if weight.is_floating_point() else weight)
    loss_fn(y)(half(x)).backward()
    for name, p in half.named_parameters():
        assert p.grad is not None, name
        assert p.grad.dtype == p.dtype, name
        assert p.grad.isfinite().all(), name
    signal = signals(half, x, y)
    output = half.model(x).detach().requires_grad_()
    (e,) = torch.autograd.grad(loss_fn(y)(output), output)
    for name, dense in matrices(half).items():
        expected = (e.double() @ dense).reshape(signal[name].shape)  # type: ignore[union-attr]
        assert_close(signal[name].double(), expected, name, tolerance=1e-6)  # type: ignore[union-attr]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_channels_last(rule: fb.Rule) -> None:
    """Another layout of the weights is no other feedback."""
    learner, (x, y) = BEFORE_POOL.attach(rule), BEFORE_POOL.batch()
    moved = copy.deepcopy(learner).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    expected = signals(learner, x, y)
    for name, signal in signals(moved, x.to(memory_format=torch.channels_last), y).items():
        assert_close(signal, expected[name], name)
    for (name, p), q in zip(learner.named_parameters(), moved.parameters(), strict=True):
        assert_close(q.grad, p.grad, name)


@pytest.mark.single
@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_compiled(rule: fb.Rule) -> None:
    """One graph, and the gradients of the plain learner."""
    torch._dynamo.reset()
    learner, (x, y) = BEFORE_POOL.attach(rule), BEFORE_POOL.batch()
    plain = copy.deepcopy(learner)
    compiled = torch.compile(learner, fullgraph=True, backend="aot_eager")
    for call in (compiled, plain):
        loss_fn(y)(call(x)).backward()
    for (name, p), q in zip(plain.named_parameters(), learner.parameters(), strict=True):
        assert_close(q.grad, p.grad, name)


# --- sizes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("pair", [MLP, BEFORE_POOL], ids=str)
def test_the_plan_shows_form_and_bytes(pair: Pair, rule: fb.Rule) -> None:
    """A row per site with the tensors' shapes, the operator unless they tell it, and their bytes."""
    model, x = pair.model().float(), pair.batch()[0].float()
    learner = fb.attach(model, rule, example=x)
    rows = str(learner).splitlines()[2:5]
    for edge, row in zip(learner.graph.edges, rows, strict=True):
        name = type(edge.operator).__name__
        assert (f" {name} " in row) == (name != "Dense"), row
        shapes = " + ".join("x".join(map(str, w.shape)) for w in learner.weights_of(edge))
        assert (shapes or "made from the seed: Seeded") in row
        held = sum(w.numel() * w.element_size() for w in learner.weights_of(edge))
        assert f" {held} B " in row or f" {held / 1000:.1f} KB " in row
    if not any(edge.operator.common for edge in learner.graph.edges):
        sizes = [e.operator.bytes(e.source_shape, e.site_shape) for e in learner.graph.edges]
        assert learner.feedback_bytes == sum(sizes)


def test_sizes_on_vgg16() -> None:
    """200 classes, 32 x 32 pixels; against dense feedback."""
    model = nets.build("vgg16", (3, 32, 32), 200)
    learner = fb.attach(
        model, fb.DFA(operator=fb.operators.Seeded()), example=torch.zeros(2, 3, 32, 32)
    )
    assert learner.feedback_bytes == 0

    def size(operator: fb.Operator) -> int:
        return sum(operator.bytes(e.source_shape, e.site_shape) for e in learner.graph.edges)

    dense = size(fb.Dense())
    assert dense > 2 * sum(4 * p.numel() for p in model.parameters())
    features = sum(
        e.site_shape[0] * e.site_shape[-1] ** 2
        for e in learner.graph.edges
        if len(e.site_shape) > 1
    )
    features += 3 * 512
    assert (len(learner.graph.edges), features) == (15, 183808), "as docs/maths.md says"
    assert dense == 4 * 200 * features
    assert size(fb.Sparse(1)) * 100 <= dense
    assert size(MAPS) * 16 <= dense
    assert size(fb.operators.Binary()) * 31 <= dense
    assert size(fb.operators.Seeded()) == 0


def feedback_warnings(rule: fb.Rule, pair: Pair = BEFORE_POOL) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pair.attach(rule, sites="layers" if rule.feeds is fb.LayerInput else pair.sites)
    return [str(w.message) for w in caught if "feedback weights" in str(w.message)]


@pytest.fixture
def small_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if feedback of any size were worth a warning."""
    monkeypatch.setattr("feedbackward.attaching.LARGE", 0)


@pytest.mark.usefixtures("small_is_told")
def test_feedback_larger_than_the_model_is_told() -> None:
    """(256 + 24 + 5) features x 3 classes x 8 bytes; the net has 356 parameters."""
    parameters = sum(p.numel() for p in BEFORE_POOL.model().parameters())
    assert parameters < 3 * 285
    for rule in (fb.DFA(), fb.DKP.published()):
        (message,) = feedback_warnings(rule)
        assert f"take {3 * 285 * 8 / 1000:.1f} KB" in message
        assert f"own parameters {parameters * 8 / 1000:.1f} KB" in message
        for form in ("fb.Sparse(1)", "fb.LowRank(r)"):
            assert form in message


@pytest.mark.parametrize(
    "rule",
    [fb.BP(), fb.Frozen(), fb.FA(), fb.KolenPollack(), fb.DGL(), *(fb.DFA(operator=o) for o in (MAPS, *FIXED))],
    ids=str,
)  # fmt: skip
@pytest.mark.usefixtures("small_is_told")
def test_other_feedback_is_not_told(rule: fb.Rule) -> None:
    """Chains and local losses have no form to choose; and what is small is small."""
    assert feedback_warnings(rule) == []


@pytest.mark.usefixtures("small_is_told")
def test_common_feedback_is_counted_once() -> None:
    """6 x 3 weights in all; as many for each site would be 54, next to 140 parameters of the net."""
    assert feedback_warnings(fb.DFA(operator=fb.operators.Shared()), MLP) == []


def test_one_patch_serves_inputs_of_any_size() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)
    )  # fmt: skip
    for operator in (fb.Pooled(), fb.operators.Kernel()):
        learner = fb.attach(
            model,
            fb.DKP.published(operator=operator),
            example=torch.zeros(2, 1, 8, 8),
            sites=["1", "3"],
        )
        learner(torch.randn(2, 1, 11, 9)).square().sum().backward()
        assert model[0].weight.grad is not None
        learner.detach()
    learner = fb.attach(
        model, fb.DFA(operator=fb.Pooled(2)), example=torch.zeros(2, 1, 8, 8), sites=["1", "3"]
    )
    with pytest.raises(fb.SiteError, match="fits no others"):
        learner(torch.randn(2, 1, 11, 9))


@pytest.mark.parametrize("operator", [*LEARNED, *FIXED], ids=str)
def test_the_probe_reads_every_form(operator: fb.Operator) -> None:
    learner, (x, y) = MLP.attach(fb.DFA(operator=operator)), MLP.batch()
    found = fb.probe(learner, loss_fn(y), x, jacobian=True)
    edges = {edge.site.name: edge for edge in learner.graph.edges}
    h: dict[str, Tensor] = {}
    for name in edges:
        learner.model.get_submodule(name).register_forward_hook(
            lambda m, a, out, name=name: h.update({name: out.detach()})
        )
    output = learner.model(x).detach()
    for name, dense in matrices(learner).items():
        readout = torch.cosine_similarity(output, h[name] @ dense.t()).mean().item()
        assert found.sites[name].readout == pytest.approx(readout, abs=1e-9)


# --- by name ---------------------------------------------------------------------------------------------------


def test_operators_by_name() -> None:
    names = "dense shared sparse binary low_rank pooled per_shape kernel seeded auto"
    assert list(fb.operators.OPERATORS) == names.split()
    assert make_operator("seeded") == fb.operators.Seeded()
    assert make_operator({"name": "low_rank", "rank": 4}) == fb.LowRank(4)
    nested = {"name": "per_shape", "maps": {"name": "pooled", "size": 2}, "vectors": "dense"}
    assert make_operator(nested) == fb.PerShape(maps=fb.Pooled(2), vectors=fb.Dense())
    deeper = {"name": "per_shape", "maps": nested, "vectors": fb.Sparse(2)}
    assert make_operator(deeper).maps == make_operator(nested)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("pool", "unknown feedback operator 'pool'.*pooled"),
        (
            {"name": "per_shape", "maps": "pool", "vectors": "dense"},
            "unknown feedback operator 'pool'",
        ),
        ({"name": "per_shape", "maps": "pooled"}, "'per_shape' needs its option 'vectors'"),
        ({"name": "seeded", "seed": 3}, "'seeded' has no option 'seed'"),
        ({"name": "sparse", "nonzero": 1}, "'sparse' has no option 'nonzero'.*nonzeros"),
    ],
)
def test_names_and_options_are_checked(spec: object, words: str) -> None:
    with pytest.raises(fb.errors.ConfigError, match=words):
        make_operator(spec)


def test_rules_by_name_take_nested_operators() -> None:
    options = {
        "operator": {
            "name": "per_shape",
            "maps": "pooled",
            "vectors": {"name": "sparse", "nonzeros": 2},
        }
    }
    expected = fb.PerShape(maps=fb.Pooled(), vectors=fb.Sparse(2))
    assert make_rule("dkp", options) == fb.DKP(operator=expected)
    assert make_rule("dfa", {"operator": "binary"}) == fb.DFA(operator=fb.operators.Binary())
