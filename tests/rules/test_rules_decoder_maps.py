"""Decoders from map to map, and the decoders' gradient over the bound of its curvature (DTP, SDTP)."""

from __future__ import annotations

import oracles
import pytest
import torch
from pairs import BEFORE_POOL, CONV, F64, MLP, Pair, assert_close
from torch import Tensor

import feedbackward as fb
from feedbackward.engine.phase import Phase
from feedbackward.operators.decoder import Decoder, MapDecoder


def written(B: Tensor, b: Tensor, s: Tensor, space: tuple[int, int]) -> Tensor:
    """The decoder by loops over the places of the site: the nearest place of the source, then the taps of the kernel."""
    high, wide = s.shape[2:]
    k = B.shape[-1] // 2
    out = []
    for p in range(space[0]):
        for q in range(space[1]):
            total = b.expand(len(s), -1)
            for i in range(-k, k + 1):
                for j in range(-k, k + 1):
                    if 0 <= p + i < space[0] and 0 <= q + j < space[1]:
                        read = s[:, :, (p + i) * high // space[0], (q + j) * wide // space[1]]
                        total = total + read @ B[:, :, i + k, j + k]
            out.append(total)
    return torch.stack(out, 2).unflatten(2, space)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("space", [(5, 4), (2, 3)], ids=["up", "down"])
def test_a_map_decoder_is_the_written_one(space: tuple[int, int], flat: bool) -> None:
    torch.manual_seed(0)
    operator = MapDecoder("tanh", 0.5, (3, 2, 3), (4, *space))
    weights = tuple(w.to(F64) for w in operator.create((), (), torch.Generator().manual_seed(1)))
    weights[1].normal_()
    s = torch.randn(6, 3, 2, 3, dtype=F64)
    site = (4 * space[0] * space[1],) if flat else (4, *space)
    got = operator.decode(weights, s.flatten(1) if flat else s, site)
    assert_close(got, written(*weights, s, space).tanh().reshape(6, *site))
    assert operator.bytes((), ()) == 4 * sum(w.numel() for w in weights)


@pytest.mark.parametrize(
    ("pair", "kinds"),
    [(CONV, [MapDecoder, Decoder]), (BEFORE_POOL, [MapDecoder, Decoder]), (MLP, [Decoder] * 2)],
    ids=str,
)
def test_maps_have_decoders_of_maps(pair: Pair, kinds: list[type]) -> None:
    """Also where a flatten lies between; `kernel=0` makes all of them dense."""
    learner = pair.attach(fb.rules.DTP())
    assert [type(edge.operator) for edge in learner.graph.edges] == kinds
    dense = pair.attach(fb.rules.DTP(kernel=0))
    assert all(type(edge.operator) is Decoder for edge in dense.graph.edges)


def inputs_of_decoders(
    pair: Pair, learner: fb.Learner, x: Tensor, drawn: list[Tensor]
) -> list[Tensor]:
    """What each decoder reads: the output of the segment above, made from the noisy site."""
    net, value = pair.mirror(learner.model), x.numpy()
    segments = [*net.segments.values(), net.head]
    found = []
    for layers, above, eps in zip(segments, segments[1:], drawn, strict=False):
        value = oracles._forward(layers, value)
        found.append(torch.tensor(oracles._forward(above, value + 0.25 * eps.numpy())))
    return found


@pytest.mark.parametrize("pair", [CONV, MLP], ids=str)
def test_the_normalized_gradient_is_the_published_one_over_a_bound_of_its_curvature(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trace of the Hessian by one output's weights is no smaller than its eigenvalues; a border lacks taps of the bound."""
    x, _ = pair.batch()
    learners, drawn = [], []
    original = Phase.noise
    monkeypatch.setattr(
        Phase, "noise", lambda self, like: drawn.append(original(self, like)) or drawn[-1]
    )
    for normalized in (False, True):
        learners.append(pair.attach(fb.rules.DTP(normalized=normalized), pair.model()))
        torch.manual_seed(3)
        learners[-1].feedback_step(x)
    read = inputs_of_decoders(pair, learners[0], x, drawn[: len(drawn) // 2])
    for edge, s in zip(learners[0].graph.edges, read, strict=False):
        published, ours = ([w.grad for w in each.weights_of(edge)[:2]] for each in learners)
        ratio = float(published[0].flatten() @ ours[0].flatten() / ours[0].square().sum())
        for p, g in zip(published, ours, strict=True):
            assert_close(p, ratio * g, tolerance=1e-9)
        trace = hessian_trace(edge.operator, s) / 0.25**2
        border = 9 / 4 if isinstance(edge.operator, MapDecoder) else 1
        assert trace <= ratio * (1 + 1e-9)
        assert ratio <= border * trace * (1 + 1e-9)


def hessian_trace(operator: Decoder | MapDecoder, s: Tensor) -> float:
    """Of sum |g(s) - h|^2 / N by one channel's weights, for a linear g: 2 mean_n |dg/dw|^2 over that channel's outputs."""
    if isinstance(operator, Decoder):
        return 2 * float(s.flatten(1).square().sum(1).mean() + 1)
    c, space = operator.below[0], operator.below[1:]
    B = torch.zeros(operator.above[0], c, *[operator.kernel] * len(space), dtype=F64)

    def outputs(kernel: Tensor, bias: Tensor) -> Tensor:
        whole = B.index_copy(1, torch.tensor([0]), kernel.unsqueeze(1))
        shift = torch.cat([bias, torch.zeros(c - 1, dtype=F64)])
        return operator.decode((whole, shift), s, operator.below)[:, 0]

    slopes = torch.autograd.functional.jacobian(
        outputs, (B[:, 0].clone(), torch.zeros(1, dtype=F64))
    )
    return 2 * sum(float(J.square().sum()) for J in slopes) / len(s)
