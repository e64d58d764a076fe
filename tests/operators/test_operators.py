"""Every feedback operator against the dense matrix that it stands for, and how it starts."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from forms import FORMS, Form
from pairs import F64, assert_close
from torch import Tensor

import feedbackward as fb
from feedbackward.operators.base import Operator

LEARNABLE = [form for form in FORMS if form.operator.learnable]


def learnable(form: Form) -> tuple[list[Tensor], fb.Weights]:
    """The weights that can be learned, as leaves, and all weights with these."""
    weights = form.weights()
    leaves = [w.clone().requires_grad_() for w in weights[: form.operator.learnable]]
    return leaves, (*leaves, *weights[len(leaves) :])


def centred(form: Form, h: Tensor) -> Tensor:
    """Kernels are shared over space: their mean is over space as well."""
    axes = [0, *range(2, h.dim())] if isinstance(form.operator, fb.operators.Kernel) else [0]
    return h - h.mean(axes, keepdim=True)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_send_is_the_product_with_the_dense_matrix(form: Form) -> None:
    operator, weights, (d, _) = form.fitted(), form.weights(), form.pass_()
    dense = form.dense(operator, weights, form.source, form.site)
    assert_close(
        operator.send(weights, d, form.site), (d.flatten(1) @ dense).reshape(len(d), *form.site)
    )


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("form", LEARNABLE, ids=str)
def test_correlate_is_the_gradient_through_the_dense_matrix(form: Form, center: bool) -> None:
    """The weights' gradients when the dense matrix has the gradient d^T h."""
    leaves, weights = learnable(form)
    d, h = form.pass_()
    gradient = d.flatten(1).t() @ (centred(form, h) if center else h).flatten(1)
    dense = form.dense(form.fitted(), weights, form.source, form.site)
    expected = torch.autograd.grad(dense, leaves, gradient)
    made = form.fitted().correlate(form.weights(), d, h, center)
    assert len(made) == form.operator.learnable
    for got, want in zip(made, expected, strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("form", LEARNABLE, ids=str)
def test_correlate_is_the_gradient_of_what_is_sent(form: Form) -> None:
    """Of sum <d B, h>, whose gradient by a dense B is d^T h."""
    leaves, weights = learnable(form)
    d, h = form.pass_()
    expected = torch.autograd.grad(form.fitted().send(weights, d, form.site), leaves, h)
    for got, want in zip(
        form.fitted().correlate(form.weights(), d, h, False), expected, strict=True
    ):
        assert_close(got, want)


@pytest.mark.parametrize("form", LEARNABLE, ids=str)
def test_decay_is_the_gradient_of_half_the_dense_matrix_squared(form: Form) -> None:
    leaves, weights = learnable(form)
    dense = form.dense(form.fitted(), weights, form.source, form.site)
    expected = torch.autograd.grad(dense.square().sum() / 2, leaves)
    made = form.fitted().decay(form.weights(), form.source, form.site)
    general = Operator.decay(form.fitted(), form.weights(), form.source, form.site)
    for got, other, want in zip(made, general, expected, strict=True):
        assert_close(got, want)
        assert_close(other, want)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_sizes(form: Form) -> None:
    operator = form.fitted()
    made = operator.create(form.source, form.site, torch.Generator())
    assert len(made) == len(operator.parts)
    assert sum(w.numel() * w.element_size() for w in made) == form.bytes
    assert operator.bytes(form.source, form.site) == form.bytes
    assert operator.macs(form.source, form.site) == form.macs
    assert all(w.dtype in (torch.float32, torch.uint8, torch.int32) for w in made), (
        "what DDP can send"
    )
    assert all(w.is_floating_point() for w in made[: operator.learnable])


@pytest.mark.parametrize("form", [f for f in FORMS if f.operator.parts], ids=str)
def test_weights_come_from_the_generator_alone(form: Form) -> None:
    one = form.weights()
    torch.manual_seed(77)
    for a, b in zip(one, form.weights(), strict=True):
        assert torch.equal(a, b)
    assert not all(torch.equal(a, b) for a, b in zip(one, form.weights(seed=1), strict=True))


def test_shared_columns_are_those_of_the_largest_site() -> None:
    """What a smaller site gets is a part of what the largest gets, and its gradient is zero elsewhere."""
    operator, (d, h) = (
        fb.operators.Shared(),
        Form(fb.operators.Shared(), (3,), (5,), FORMS[1].dense, 0, 0).pass_(),
    )
    weights = tuple(w.double() for w in operator.create((3,), (2, 4), torch.Generator()))
    whole, part = (operator.send(weights, d, site) for site in ((8,), (5,)))
    assert torch.equal(whole[:, :5], part)
    (grad,) = operator.correlate(weights, d, h, False)
    assert_close(grad, torch.cat([d.t() @ h, torch.zeros(3, 3, dtype=F64)], 1))
    (own,) = operator.decay(weights, (3,), (5,))
    assert torch.equal(own, torch.cat([weights[0][:, :5], torch.zeros(3, 3, dtype=F64)], 1))


# --- how they start -------------------------------------------------------------------------------------------


def dense_start(operator: fb.Operator, site: fb.Shape, classes: int = 40) -> Tensor:
    """The dense matrix of fresh weights, by unit errors; the products are exact."""
    operator = operator.fit((classes,), site, 3)
    weights = operator.create((classes,), site, torch.Generator().manual_seed(2))
    return operator.send(weights, torch.eye(classes), site).flatten(1)


KAIMING, NORMAL, UNIFORM = math.sqrt(2), 1.0, 1 / math.sqrt(3)


@pytest.mark.parametrize(
    ("operator", "std"),
    [
        (fb.operators.Shared(), UNIFORM),
        (fb.operators.Shared("kaiming_uniform", 0.5), KAIMING / 2),
        (fb.operators.Binary(), KAIMING),
        (fb.operators.Binary(3.0), 3 * KAIMING),
        (fb.operators.Seeded(), KAIMING),
        (fb.operators.Seeded(2.0, "binary"), 2 * KAIMING),
        (fb.LowRank(8), KAIMING),
        (fb.LowRank(8, "scaled_normal", 0.1), 0.1 * NORMAL),
        (fb.Pooled(2), KAIMING),
        (fb.Pooled(2, "scaled_uniform", 2.0), 2 * UNIFORM),
    ],
    ids=str,
)
def test_entries_have_the_variance_of_dense(operator: fb.Operator, std: float) -> None:
    """std / sqrt(n), n all features of the site."""
    B = dense_start(operator, (20, 10, 10))
    assert B.shape == (40, 2000)
    assert B.std().item() * math.sqrt(2000) == pytest.approx(std, rel=0.06)
    assert abs(B.mean().item()) < 0.1 * B.std().item()


@pytest.mark.parametrize(
    ("operator", "source"),
    [
        (fb.Pooled(), (40,)),
        (fb.Pooled(4), (40,)),
        (fb.LowRank(20), (40,)),
        (fb.operators.Kernel(), (40,)),
        (fb.operators.Kernel(3, groups=4), (40,)),
        (fb.operators.Kernel(), (40, 16, 16)),
        (fb.operators.Kernel(5, groups=2), (40, 8, 8)),
        (fb.operators.Binary(), (40,)),
        (fb.operators.Seeded(), (40,)),
    ],
    ids=str,
)
def test_signals_have_the_norm_of_dense(operator: fb.Operator, source: fb.Shape) -> None:
    """E |d B|^2 = 2 |d|^2 whatever the site's width; what kernels send over the border is missing, under 3/16 of it. From a
    vector the k x k weights add up at a place, and their number is near k^2 but at the border."""
    site, generator = (32, 16, 16), torch.Generator().manual_seed(4)
    d = torch.randn(200, *source, generator=generator)
    signal = operator.fit(source, site, 3).send(operator.create(source, site, generator), d, site)
    ratio = (signal.norm() / d.norm()).item() ** 2
    assert 2 * (1 - 3 / 16) < ratio < 2 * 1.15


@pytest.mark.parametrize(("nonzeros", "classes"), [(1, 40), (4, 40), (1, 10)])
def test_sparse_values_are_those_of_the_authors_code(nonzeros: int, classes: int) -> None:
    """U(-1/q, 1/q), q = sqrt(n / sqrt(C s))."""
    n = 3000
    values = fb.Sparse(nonzeros, 2.0).create((classes,), (n,), torch.Generator().manual_seed(0))[0]
    bound = 2.0 / math.sqrt(n / math.sqrt(classes * nonzeros))
    assert values.abs().max().item() == pytest.approx(bound, rel=1e-2)
    assert values.abs().max().item() <= bound * (1 + 1e-6)
    assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize("init", ["zeros", "kaiming_uniform"])
def test_low_rank_factors_can_both_learn_at_the_start(init: str) -> None:
    """With V = 0 nothing is sent, but V gets a gradient; with U = 0 as well neither ever would."""
    operator, generator = fb.LowRank(2, init), torch.Generator().manual_seed(0)
    U, V = operator.create((3,), (5,), generator)
    assert U.abs().min() > 0
    assert bool(V.any()) == (init != "zeros")
    grads = operator.correlate((U, V), torch.randn(4, 3), torch.randn(4, 5), False)
    assert grads[1].abs().min() > 0


def test_zeros_and_scale_zero_send_nothing() -> None:
    zero = [
        fb.operators.Shared("zeros"),
        fb.LowRank(2, "zeros"),
        fb.Pooled(2, "zeros"),
        fb.operators.Kernel(init="zeros"),
        fb.Sparse(scale=0),
    ]
    for operator in zero:
        assert not dense_start(operator, (4, 4)).any()


@pytest.mark.parametrize(
    ("units", "features", "nonzeros"),
    [(1, 5, 1), (5, 13, 1), (5, 13, 2), (5, 13, 5), (6, 4, 3), (6, 4, 6), (12, 20, 9), (200, 77, 3), (7, 1, 4), (4, 8, 3)],
)  # fmt: skip
def test_supports_are_exact_and_balanced(units: int, features: int, nonzeros: int) -> None:
    operator = fb.Sparse(nonzeros)
    values, index = operator.create((units,), (features,), torch.Generator().manual_seed(1))
    assert index.shape == values.shape == (nonzeros, features)
    for j in range(features):
        assert len(set(index[:, j].tolist())) == nonzeros
    for part in (*index, index.flatten()):
        listeners = Counter(part.tolist())
        counts = [listeners[c] for c in range(units)]
        assert sum(listeners.values()) == part.numel(), "a unit that is not there"
        assert max(counts) - min(counts) <= 1


def test_supports_are_random() -> None:
    """Each of the 15 pairs of 6 units equally often, over seeds, at each feature: 4,000 draws, 267 +- 16 of each."""
    pairs: Counter[frozenset[int]] = Counter()
    for seed in range(200):
        _, index = fb.Sparse(2).create((6,), (20,), torch.Generator().manual_seed(seed))
        pairs.update(frozenset(column) for column in index.t().tolist())
    assert len(pairs) == 15
    assert all(abs(count - 4000 / 15) < 5 * 16 for count in pairs.values())


@pytest.mark.parametrize(
    ("units", "dtype"), [(256, torch.uint8), (257, torch.int32), (70000, torch.int32)]
)
def test_supports_take_few_bytes(units: int, dtype: torch.dtype) -> None:
    """No int16: torch.distributed cannot broadcast it."""
    _, index = fb.Sparse().create((units,), (3 * units,), torch.Generator())
    assert index.dtype == dtype
    assert index.long().max() == units - 1


def test_binary_bits_are_fair() -> None:
    B = dense_start(fb.operators.Binary(), (2001,))
    assert set(B.unique().tolist()) == {
        s * torch.tensor(math.sqrt(2 / 2001)).item() for s in (-1, 1)
    }
    for sums in (B.sign().mean(0) * math.sqrt(40), B.sign().mean(1) * math.sqrt(2001)):
        assert sums.abs().max() < 5


# --- what they refuse ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: fb.operators.Shared("xavier"), r"unknown feedback initialisation 'xavier'.*choose one of zeros, kaiming"),
        (lambda: fb.LowRank(2, "x"), "choose one of zeros"),
        (lambda: fb.Pooled(init="x"), "choose one of zeros"),
        (lambda: fb.operators.Kernel(init="x"), "choose one of zeros"),
        (lambda: fb.Dense(scale=-1.0), r"scale=-1.0.*give a finite number"),
        (lambda: fb.operators.Shared(scale=math.inf), "finite number"),
        (lambda: fb.Sparse(scale=math.nan), "finite number"),
        (lambda: fb.operators.Binary("1"), "finite number"),
        (lambda: fb.operators.Seeded(True), "finite number"),
        (lambda: fb.Sparse(0), r"nonzeros=0: give a whole number of at least 1"),
        (lambda: fb.Sparse(1.5), "nonzeros=1.5"),
        (lambda: fb.LowRank(0), "rank=0"),
        (lambda: fb.LowRank("4"), "rank='4'"),
        (lambda: fb.Pooled(0), "size=0"),
        (lambda: fb.operators.Kernel(4), r"size=4.*odd size"),
        (lambda: fb.operators.Kernel(dilation=0), "dilation=0"),
        (lambda: fb.operators.Kernel(groups=0), "groups=0"),
        (lambda: fb.operators.Seeded(distribution="normal"), r"unknown distribution 'normal'.*uniform, binary"),
        (lambda: fb.PerShape(fb.Pooled, fb.Dense()), r"maps must be an instance of an Operator, for example fb\.Dense\(\)"),
        (lambda: fb.PerShape(fb.Pooled(), "dense"), "vectors must be an instance"),
    ],
)  # fmt: skip
def test_options_are_checked(make, words: str) -> None:
    with pytest.raises(fb.AttachError, match=words):
        make()


@pytest.mark.parametrize(
    ("operator", "source", "site", "words"),
    [
        (fb.Sparse(4), (3,), (5,), r"nonzeros=4.*only 3 units.*at most that many"),
        (fb.LowRank(4), (3,), (50,), r"rank=4 for 3 source units and 50 features.*at most 3.*Use Dense"),
        (fb.LowRank(4), (30,), (2,), r"rank at most 2"),
        (fb.Pooled(), (3,), (50,), r"shape \[50\] has none: use fb\.PerShape\(maps=fb\.Pooled"),
        (fb.operators.Kernel(), (3,), (50,), r"shape \[50\] has none: use fb\.PerShape\(maps=fb\.operators\.Kernel"),
        (fb.operators.Kernel(), (3, 2), (5, 4, 4), r"\[3, 2\] to an activity of shape \[5, 4, 4\]\. Use Dense or Pooled"),
        (fb.operators.Kernel(), (3,), (5, 2, 2, 2, 2), "one to three dimensions"),
        (fb.operators.Kernel(), (3, 3, 4), (5, 8, 8), r"no whole stride leads from \[3, 4\] to \[8, 8\].*use Dense or Pooled"),
        (fb.operators.Kernel(), (3, 8), (5, 4), "no whole stride"),
        (fb.operators.Kernel(groups=2), (3,), (4, 4), r"groups=2.*3 channels.*4 of the site.*groups=1"),
        (fb.operators.Kernel(groups=2), (4,), (3, 4), "groups=2"),
        (fb.PerShape(fb.Pooled(), fb.LowRank(4)), (3,), (50,), "rank=4"),
    ],
    ids=str,
)  # fmt: skip
def test_shapes_are_checked(
    operator: fb.Operator, source: fb.Shape, site: fb.Shape, words: str
) -> None:
    with pytest.raises(fb.AttachError, match=words):
        operator.fit(source, site, 0)


def test_per_shape_chooses_and_serves_nothing_itself() -> None:
    maps, vectors = fb.Pooled(2), fb.Sparse(2)
    operator = fb.PerShape(maps=maps, vectors=vectors)
    assert operator.fit((3,), (4, 5), 0) is maps
    assert operator.fit((3,), (4, 5, 5, 5), 0) is maps
    assert operator.fit((3,), (40,), 0) is vectors
    assert operator.fit((3,), (), 0) is vectors
    assert operator.macs((3,), (2, 4, 4)) == 3 * 2 * 4
    assert operator.bytes((3,), (10,)) == 2 * 10 * 5
    for call in (
        lambda: operator.create((3,), (5,), torch.Generator()),
        lambda: operator.send((), torch.ones(1, 3), (5,)),
    ):
        with pytest.raises(fb.AttachError, match="use the one that fit"):
            call()


@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 2, 3)])
def test_identity_sends_the_error_itself(shape: tuple[int, ...]) -> None:
    operator = fb.Dense("identity", scale=0.5)
    weights = operator.fit(shape, shape, 0).create(shape, shape, torch.Generator())
    d = torch.randn(4, *shape)
    torch.testing.assert_close(operator.send(weights, d, shape), 0.5 * d)
    with pytest.raises(
        fb.AttachError, match="identity feedback needs a source and a site of one shape"
    ):
        operator.fit(shape, (*shape, 1), 0)
