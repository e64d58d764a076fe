"""Rules with fixed direct feedback, and graphs of modules: their equations as loops, and the property that makes each."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import oracles
import pytest
import torch
from pairs import (
    CONV,
    F64,
    MLP,
    PAIRS,
    TOKENS,
    Pair,
    assert_close,
    exact_grads,
    grads,
    loss_fn,
    signals,
)
from rows import Equations
from torch import Tensor, nn
from zoo import build, case

import feedbackward as fb

DFA, BP = oracles.direct, oracles.backprop
Array = oracles.Array


class Law:
    """A row that is nothing but a signal."""

    feedback = None

    def __init__(self, signal: Callable[[oracles.Known], Array]) -> None:
        self.signal = signal


def check(
    pair: Pair,
    rule: fb.Rule,
    laws: dict[str, Law],
    feedback: Callable[[fb.Learner], dict[str, Array]],
) -> fb.Learner:
    """Signals and gradients of one step, against the oracle's layers and these signals at its cuts."""
    model = pair.model()
    x, y = pair.batch()
    learner = pair.attach(rule, model)
    expected = oracles.step(
        pair.mirror(model), x.numpy(), y.numpy(), Equations(laws), feedback(learner)
    )  # type: ignore[arg-type]
    for name, h in signals(learner, x, y).items():
        assert_close(h, expected.signals[name], name)
    for name, gradient in grads(model).items():
        assert_close(gradient, expected.parameters[name], name)
    return learner


def matrices(learner: fb.Learner) -> dict[str, Array]:
    """The dense matrix `[C, *site]` of every edge, from what it does to each unit of the source."""
    found = {}
    for edge in learner.graph.edges:
        unit = torch.eye(edge.source_size, dtype=F64).reshape(-1, *edge.source_shape)
        found[edge.site.name] = edge.operator.send(
            learner.weights_of(edge), unit, edge.site_shape
        ).numpy()
    return found


DIRECT = (
    fb.rules.SharedDFA(scale=2.0),
    fb.rules.SparseDFA(nonzeros=2),
    fb.rules.BinaryDFA(),
    fb.rules.PDFA(),
)


@pytest.mark.parametrize("pair", [MLP, CONV, TOKENS], ids=str)
@pytest.mark.parametrize("rule", DIRECT, ids=lambda rule: rule.name)
def test_they_are_dfa_with_their_own_matrices(rule: fb.Rule, pair: Pair) -> None:
    learner = check(pair, rule, dict.fromkeys(pair.cuts, Law(DFA)), matrices)
    assert not list(learner.feedback.parameters())


def wide(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n, m in zip((5, *widths), widths, strict=False):
        layers += [nn.Linear(n, m), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 10))


def attached(rule: fb.Rule, *widths: int) -> dict[str, Array]:
    learner = fb.attach(wide(*widths).double(), rule, example=torch.randn(3, 5, dtype=F64))
    return matrices(learner)


def test_shared_one_matrix_whose_scale_is_independent_of_width() -> None:
    """Each layer's matrix is the first columns of the widest one's, U(-1, 1) / sqrt(m); so its entries have the same
    standard deviation in a dominates layer, where DFA's own grow as 1 / sqrt(n)."""
    found = attached(fb.rules.SharedDFA(), 40, 4000, 400)
    whole = found["3"]
    for B, n in zip(found.values(), (40, 4000, 400), strict=True):
        assert np.array_equal(B, whole[:, :n])
        assert B.std() == pytest.approx(1 / math.sqrt(3 * 4000), rel=4 / math.sqrt(10 * n))
    assert np.abs(whole).max() <= 1 / math.sqrt(4000)
    plain = [B.std() for B in attached(fb.DFA(), 40, 4000, 400).values()]
    assert plain[0] / plain[1] == pytest.approx(10, rel=0.2)


def test_shared_takes_the_memory_of_the_widest() -> None:
    learner = fb.attach(wide(40, 4000, 400), fb.rules.SharedDFA(), example=torch.randn(3, 5))
    assert learner.feedback_bytes == 4 * 10 * 4000


@pytest.mark.parametrize("s", [1, 3])
def test_sparse_listens_to_s_classes(s: int) -> None:
    """Exactly s weights per unit, within the authors' bounds, and classes with as many listeners."""
    for n, B in zip(
        (60, 300), attached(fb.rules.SparseDFA(nonzeros=s), 60, 300).values(), strict=True
    ):
        assert (np.count_nonzero(B, axis=0) == s).all()
        listeners = np.count_nonzero(B, axis=1)
        assert listeners.max() - listeners.min() <= 1
        bound = math.sqrt(math.sqrt(10 * s) / n)
        assert 0.8 * bound < np.abs(B).max() <= bound


def test_binary_and_generated_feedback_are_signs_of_one_magnitude() -> None:
    for rule in (fb.rules.BinaryDFA(), fb.rules.PDFA()):
        for n, B in zip((60, 300), attached(rule, 60, 300).values(), strict=True):
            np.testing.assert_allclose(np.abs(B), math.sqrt(2 / n), rtol=1e-6)
            assert abs((B > 0).mean() - 0.5) < 4 * 0.5 / math.sqrt(B.size)


def test_what_each_stores() -> None:
    """One bit per weight, and nothing."""
    x, model = torch.randn(3, 5), wide(60, 300)
    assert fb.attach(model, fb.rules.BinaryDFA(), example=x).feedback_bytes == 10 * 360 / 8
    learner = fb.attach(model, fb.rules.PDFA(), example=x)
    assert learner.feedback_bytes == 0
    assert not list(learner.feedback.state_dict())


@pytest.mark.parametrize(
    "rule",
    [fb.rules.SharedDFA, fb.rules.SparseDFA, fb.rules.BinaryDFA, fb.rules.PDFA, fb.rules.KernelDFA],
    ids=lambda kind: kind.name,
)
def test_zero_feedback_is_refused(rule: type[fb.Rule]) -> None:
    with pytest.raises(fb.AttachError, match="would never train a hidden layer"):
        rule(scale=0.0)  # type: ignore[call-arg]


# --- convolutions by backprop, the rest by DFA -----------------------------------------------------------------


@pytest.mark.parametrize("pair", [p for p in PAIRS if p is CONV or len(p.shape) == 1], ids=str)
@pytest.mark.parametrize("operator", [fb.Dense(), fb.operators.Binary()], ids=["dense", "binary"])
def test_cdfa_is_backprop_below_the_flattened_map(pair: Pair, operator: fb.Operator) -> None:
    """What enters the top convolution is DFA's signal of the flattened features; below it is true."""
    laws = {cut: Law(BP if cut.startswith("pool") else DFA) for cut in pair.cuts}
    learner = check(pair, fb.rules.CDFA(operator=operator), laws, matrices)
    assert [site.name for site in learner.graph.sites] == [
        cut for cut in pair.cuts if cut != "pool1"
    ]


def test_cdfa_needs_features_that_are_no_map() -> None:
    with pytest.raises(fb.AttachError, match=r"every site here is a map \('act2': \[6, 2, 2\]\)"):
        CONV.attach(fb.rules.CDFA(), sites=["pool1", "act2"])
    with pytest.raises(fb.AttachError, match="fixed"):
        fb.rules.CDFA(operator=fb.Dense("zeros"))


# --- kernels ---------------------------------------------------------------------------------------------------


def kernel_signal(known: oracles.Known) -> Array:
    """The input gradient of a convolution with the kernel B, whose output gradient is the error at every place."""
    stride, padding = 2, 1  # of the pair's second convolution; its groups are not B's
    layer = oracles.Conv("", stride, padding, 1, weight=known.B, bias=np.zeros(len(known.B)))
    space = layer.forward(known.h).shape[2:]
    return layer.backward(np.broadcast_to(known.e[:, :, None, None], (*known.e.shape, *space)))


def test_kernel_dfa_sends_a_constant_map_through_the_layers_geometry() -> None:
    laws = {"pool1": Law(kernel_signal), "flat": Law(DFA), "act3": Law(DFA)}
    names = {"conv2.input": "pool1", "fc1.input": "flat", "head.input": "act3"}
    model, (x, y) = CONV.model(), CONV.batch()
    learner = CONV.attach(fb.rules.KernelDFA(), model)
    feedback = {names[e.site.name]: learner.feedback_of(e).numpy() for e in learner.graph.edges}
    assert [B.shape for B in feedback.values()] == [(3, 4, 3, 3), (3, 24), (3, 5)]
    expected = oracles.step(CONV.mirror(model), x.numpy(), y.numpy(), Equations(laws), feedback)  # type: ignore[arg-type]
    for name, h in signals(learner, x, y).items():
        assert_close(h, expected.signals[names[name]], name)
    for name, gradient in grads(model).items():
        assert_close(gradient, expected.parameters[name], name)


CONVOLUTIONS = (
    nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2),
    nn.Conv2d(4, 6, (3, 2), stride=(1, 3), padding=(2, 0)),
    nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    nn.Conv2d(4, 6, 2, padding="same"),
    nn.Conv2d(4, 6, 3, padding=1, groups=2),
    nn.Conv3d(4, 6, 2, padding=1, stride=2),
    nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1),
    nn.ConvTranspose2d(4, 6, (2, 3), stride=(1, 2), dilation=2),
)


class SpaceSum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).sum(2)


@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
def test_kernel_dfa_is_backprop_where_the_error_is_a_constant_map(layer: nn.Module) -> None:
    """Between a convolution and the sum over space everything is linear, so B = V W gives the true signals."""
    transposed = layer.transposed
    dims, groups = layer.weight.dim() - 2, layer.groups
    below = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](2, 4, 1)
    model = nn.Sequential(below, layer, SpaceSum(), nn.Linear(6, 3)).double()
    x, y = torch.randn(5, 2, *[7, 6, 5][:dims], dtype=F64), torch.randint(3, (5,))
    truth = exact_grads(model, x, y)
    learner = fb.attach(model, fb.rules.KernelDFA(), example=x, sites=["1"])
    W = layer.weight.detach()
    if groups > 1:  # written without groups
        blocks = [
            torch.cat([part if j == i else torch.zeros_like(part) for j in range(groups)], 1)
            for i, part in enumerate(W.chunk(groups))
        ]
        W = torch.cat(blocks)
    V = model[3].weight.detach()
    with torch.no_grad():
        learner.feedback_of(learner.graph.edges[0]).copy_(
            torch.einsum("co,io...->ic..." if transposed else "co,oi...->ci...", V, W)
        )
    loss_fn(y)(learner(x)).backward()
    for name, gradient in grads(model).items():
        assert_close(gradient, truth[name], name, tolerance=1e-12)


def test_kernels_fit_images_of_other_sizes_and_cost_little() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    learner = fb.attach(model, fb.rules.KernelDFA(), example=torch.randn(2, 1, 8, 8))
    learner(torch.randn(3, 1, 11, 7)).sum().backward()
    assert model[0].weight.grad.abs().max() > 0
    kernel, dense = (edge.operator for edge in learner.graph.edges)
    assert (kernel.bytes((3,), (4, 6, 6)), dense.bytes((3,), (8,))) == (4 * 3 * 4 * 9, 4 * 3 * 8)
    assert kernel.macs((3,), (4, 6, 6)) == 3 * 4 * 9 * 16
    assert learner.feedback_bytes == 4 * 3 * (4 * 9 + 8)


# --- modules ---------------------------------------------------------------------------------------------------


def test_errors_that_no_module_makes_cannot_be_sent_on() -> None:
    model, example = build(case("resnet_functional"))
    with pytest.raises(fb.AttachError, match=r"'b.input', but no module makes that tensor"):
        fb.attach(model, fb.rules.Han2020(), example=example)
