"""Seeded feedback: the bits of its hash, their statistics, and that nothing but the seed and the place matters."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
from forms import mixed
from pairs import CONV, F64, loss_fn, signals
from torch import Tensor

import feedbackward as fb
from feedbackward.operators import seeded
from feedbackward.operators.counter import words

KINDS = ("uniform", "binary")


def fitted(kind: str, seed: int = 2**61 + 5, scale: float = 1.0) -> fb.operators.Seeded:
    operator = fb.operators.Seeded(scale, kind).fit((3,), (5,), seed)
    assert isinstance(operator, fb.operators.Seeded)
    return operator


def matrix(kind: str, seed: int, classes: int = 64, n: int = 1000) -> Tensor:
    """Scaled to variance 1."""
    return fitted(kind, seed).materialize((classes,), (n,)).double() * math.sqrt(n / 2)


@pytest.mark.parametrize("key", [0, 1, 2**31, 2**62 + 12345, 2**63 - 1])
@pytest.mark.parametrize("start", [0, 1000, 2**32 - 2, 2**33 + 7])
def test_the_hash_is_the_one_in_python_s_integers(key: int, start: int) -> None:
    stream = mixed(mixed(key % 2**32) ^ (key >> 32))
    expected = [mixed(mixed(i % 2**32) ^ (i >> 32) ^ stream) for i in range(start, start + 5)]
    assert words(key, start, start + 5, None).tolist() == expected
    assert max(expected) < 2**32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
def test_dense_feedback_of_the_same_matrix_sends_the_same_bits(
    kind: str, dtype: torch.dtype
) -> None:
    operator, site = fitted(kind), (3, 4, 5)
    d = torch.randn(6, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    B = operator.materialize((7,), site)
    assert B.shape == (7, *site)
    assert B.dtype == torch.float32
    assert torch.equal(operator.send((), d, site), fb.Dense().send((B.to(dtype),), d, site))


@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_learner_of_the_same_matrices_has_the_same_gradients(kind: str) -> None:
    x, y = CONV.batch()
    made, dense = (
        CONV.attach(fb.DFA(operator=o))
        for o in (fb.operators.Seeded(distribution=kind), fb.Dense())
    )
    for a, b in zip(made.graph.edges, dense.graph.edges, strict=True):
        assert isinstance(a.operator, fb.operators.Seeded)
        dense.feedback_of(b).copy_(a.operator.materialize(a.source_shape, a.site_shape))
    expected = signals(dense, x, y)
    for name, signal in signals(made, x, y).items():
        assert torch.equal(signal, expected[name])  # type: ignore[arg-type]
    assert made.feedback_bytes == 0


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_and_threads_and_generators_do_not_matter(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = fitted(kind).materialize((9,), (50,))
    torch.manual_seed(4)
    state = torch.get_rng_state()
    for chunk, threads in ((32, 1), (64, 2), (4096, 2)):
        monkeypatch.setattr(seeded, "_CHUNK", chunk)
        torch.set_num_threads(threads)
        try:
            assert torch.equal(fitted(kind).materialize((9,), (50,)), expected)
        finally:
            torch.set_num_threads(1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_on_every_device(kind: str) -> None:
    unit = torch.eye(9, device="cuda")
    sent = fitted(kind).send((), unit, (50,))
    assert torch.equal(sent.cpu(), fitted(kind).materialize((9,), (50,)))


def test_edges_and_seeds_differ() -> None:
    """By the learner's seed and the site's name; the same when attached again, copied or pickled."""
    one, again, other = (
        CONV.attach(fb.DFA(operator=fb.operators.Seeded()), seed=s) for s in (0, 0, 1)
    )
    seeds = [[e.operator.seed for e in learner.graph.edges] for learner in (one, again, other)]  # type: ignore[attr-defined]
    assert seeds[0] == seeds[1]
    assert len({*seeds[0], *seeds[2]}) == 6
    for twin in (
        copy.deepcopy(one.graph.edges[0].operator),
        pickle.loads(pickle.dumps(one.graph.edges[0].operator)),
    ):
        assert twin == one.graph.edges[0].operator
    assert one.rule == fb.DFA(operator=fb.operators.Seeded()), (
        "the rule's own operator stays as it was"
    )
    assert "seed=" not in str(one)
    x, y = CONV.batch()
    twin = copy.deepcopy(one)
    loss_fn(y)(one(x)).backward()
    loss_fn(y)(twin(x)).backward()
    for p, q in zip(one.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)  # type: ignore[arg-type]


def test_without_a_seed_nothing_is_made() -> None:
    for call in (
        lambda: fb.operators.Seeded().materialize((3,), (5,)),
        lambda: fb.operators.Seeded().send((), torch.ones(1, 3), (5,)),
    ):
        with pytest.raises(fb.AttachError, match=r"no seed yet: use the operator that fit"):
            call()


# --- statistics: 64,000 weights, of variance 1 ------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_moments(kind: str, seed: int) -> None:
    """Within five standard errors of mean 0, variance 1 and kurtosis 9/5 (uniform) or 1 (signs), in all, by row and by column."""
    B = matrix(kind, seed)
    kurtosis = 1.8 if kind == "uniform" else 1.0
    spread = math.sqrt(kurtosis - 1)
    for size, means, squares in (
        (64000, B.mean(), B.square().mean()),
        (1000, B.mean(1), B.square().mean(1)),
        (64, B.mean(0), B.square().mean(0)),
    ):
        assert (means * math.sqrt(size)).abs().max() < 5
        assert ((squares - 1) * math.sqrt(size)).abs().max() <= 5 * spread + 1e-4
    assert B.pow(4).mean().item() == pytest.approx(kurtosis, abs=0.05)
    bound = math.sqrt(3) if kind == "uniform" else 1.0
    assert bound * 0.9999 < B.abs().max() <= bound * 1.0001


def test_uniform_weights_fill_their_range_evenly() -> None:
    """Chi squared of 64 bins, 1,000 expected in each: 63 +- 11."""
    counts = torch.histc(matrix("uniform", 3), 64, -math.sqrt(3), math.sqrt(3))
    assert abs(((counts - 1000).square() / 1000).sum().item() - 63) < 5 * math.sqrt(2 * 63)


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_are_independent(kind: str) -> None:
    """No correlation above five standard errors between seeds that differ by one or one bit, rows, columns, or lags."""
    base = matrix(kind, 1000)
    for seed in (1001, 999, 1000 + 2**32, 1000 ^ 2**20, 1000 + 2**62):
        other = matrix(kind, seed)
        assert abs((base * other).mean().item()) * math.sqrt(64000) < 5
        assert (base * other).mean(1).abs().max() * math.sqrt(1000) < 5
    correlations = base @ base.t() / 1000 - torch.eye(64)
    # the diagonal is each row's variance, tested above
    assert correlations.fill_diagonal_(0).abs().max() * math.sqrt(1000) < 5.5
    flat = base.flatten()
    for lag in (1, 2, 8, 31, 32, 33, 1000, 1024):
        assert abs((flat[lag:] * flat[:-lag]).mean().item()) * math.sqrt(len(flat) - lag) < 5


def test_the_bits_of_a_word_are_independent() -> None:
    """Every one of the 32 is fair, and no two of them, in one word or in words of neighbouring counts, go together."""
    bits = (words(77, 0, 20000, None).unsqueeze(1) >> torch.arange(32)) & 1
    signs = bits.double() * 2 - 1
    assert signs.mean(0).abs().max() * math.sqrt(20000) < 5
    for a, b in itertools.product((signs[:-1],), (signs[:-1], signs[1:])):
        together = a.t() @ b / math.sqrt(len(a))
        if a.data_ptr() == b.data_ptr():
            together.fill_diagonal_(0)
        assert together.abs().max() < 5.5
