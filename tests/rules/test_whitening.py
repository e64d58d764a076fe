"""The learning of DKP's feedback from activities whose channels are uncorrelated."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from pairs import F64, loss_fn
from torch import Tensor, nn

import feedbackward as fb
from feedbackward.rules.direct import whitening

MAPS = {
    "1d": (nn.Conv1d, (3, 7)),
    "2d": (nn.Conv2d, (3, 5, 4)),
    "3d": (nn.Conv3d, (3, 3, 4, 2)),
}


def site(shape: tuple[int, ...], tokens: int = 0) -> fb.Site:
    return fb.Site("a", (), shape, tokens)


def whitened(site: fb.Site, h: Tensor, center: bool, ridge: float) -> Tensor:
    """With a source of as many units as samples, whose product with the activity is the activity."""
    _, x = whitening.whitened(site, torch.eye(len(h), dtype=h.dtype), h, center, ridge)
    return x


def by_hand(h: np.ndarray, axis: int, ridge: float, center: bool = True) -> np.ndarray:
    """Sample by sample and place by place: h, or what differs from its mean, times C^-1."""
    centred = np.moveaxis(h - h.mean(0) if len(h) > 1 else h, axis, -1)
    h = centred if center else np.moveaxis(h, axis, -1)
    rows = centred.reshape(-1, h.shape[-1])
    C = sum(np.outer(row, row) for row in rows) / len(rows)
    inverse = np.linalg.inv(C + ridge * np.trace(C) / len(C) * np.eye(len(C)))
    return np.moveaxis(
        np.array([inverse @ row for row in h.reshape(rows.shape)]).reshape(h.shape), -1, axis
    )


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("ridge", [0.1, 2.0])
def test_gradients_of_maps(kind: str, center: bool, ridge: float) -> None:
    conv, shape = MAPS[kind]
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    x, e = torch.randn(6, *shape), torch.randn(6, 3, dtype=F64)
    model(x)
    model, x = model.to(F64), x.to(F64)
    rule = fb.DKP(operator=fb.Dense(), center=center, ridge=ridge)
    learner = fb.attach(model, rule, example=x, sites=["1"])
    (learner(x) * e).sum().backward()
    with torch.no_grad():
        h = model[:2](x).numpy()
    expected = np.einsum("mk,m...->k...", e.numpy(), by_hand(h, 1, ridge, center))
    (B,) = learner.feedback.parameters()
    np.testing.assert_allclose(B.grad.numpy(), expected, atol=1e-10)


def test_gradients_of_tokens() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).to(F64)
    x, e = torch.randn(6, 7, 4, dtype=F64), torch.randn(6, 7, 3, dtype=F64)
    learner = fb.attach(model, fb.DKP(), example=x)
    (learner(x) * e).sum().backward()
    with torch.no_grad():
        h = model[:2](x).flatten(0, 1).numpy()
    (B,) = learner.feedback.parameters()
    expected = np.einsum("mk,mn->kn", e.flatten(0, 1).numpy(), by_hand(h, -1, 0.1, center=False))
    np.testing.assert_allclose(B.grad.numpy(), expected, atol=1e-10)


@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 3)])
def test_features_of_tokens_are_the_last_dimension(shape: tuple[int, ...]) -> None:
    """Whatever the sizes, and whether or not the source has the tokens too."""
    h = torch.randn(6, *shape, dtype=F64)
    made = whitened(site(shape, len(shape) - 1), h, True, 0.1)
    np.testing.assert_allclose(made.numpy(), by_hand(h.numpy(), -1, 0.1), atol=1e-10)
    rows = h.flatten(0, -2)
    made = whitened(site(shape, len(shape) - 1), rows, True, 0.1)
    np.testing.assert_allclose(made.numpy(), by_hand(rows.numpy(), -1, 0.1), atol=1e-10)


def test_vectors_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(F64)
    x, y = torch.randn(6, 4, dtype=F64), torch.randint(3, (6,))
    learner = fb.attach(model, fb.DKP(), example=x)
    loss_fn(y)(learner(x)).backward()
    with torch.no_grad():
        e, h = (torch.softmax(model(x), 1) - torch.eye(3, dtype=F64)[y]) / 6, model[:2](x)
    (B,) = learner.feedback.parameters()
    torch.testing.assert_close(B.grad, e.T @ h)


@examples(100, 2000)
@given(
    st.integers(1, 30), st.lists(st.integers(1, 4), min_size=1, max_size=2), st.integers(1, 40),
    st.lists(st.integers(1, 7), min_size=1, max_size=2), st.booleans(), st.booleans(),
    st.booleans(),
)  # fmt: skip
def test_few_units_or_few_samples_give_the_same_product(
    samples: int,
    source: list[int],
    channels: int,
    places: list[int],
    tokens: bool,
    center: bool,
    turned: bool,
) -> None:
    generator = torch.Generator().manual_seed(samples)
    shape = (*places, channels) if tokens else (channels, *places)
    h = torch.randn(samples, *shape, generator=generator, dtype=F64)
    if turned:
        h = h.transpose(1, -1).contiguous().transpose(1, -1)
    e = torch.randn(samples, *source, generator=generator, dtype=F64)
    at = site(shape, len(places) if tokens else 0)
    d, x = whitening.whitened(at, e, h, center, 0.1)
    assert tuple(d.shape[1:]) == tuple(source)
    assert tuple(x.shape[1:]) == shape
    expected = by_hand(h.numpy(), -1 if tokens else 1, 0.1, center)
    np.testing.assert_allclose(
        np.einsum("mk,mn->kn", d.flatten(1).numpy(), x.flatten(1).numpy()),
        np.einsum("mk,mn->kn", e.flatten(1).numpy(), expected.reshape(samples, -1)),
        atol=1e-9,
    )
    assert len(d) <= samples


@examples(40, 2000)
@given(
    st.integers(2, 6), st.integers(1, 5), st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.integers(0, 2**16),
)  # fmt: skip
def test_an_invertible_mixture_of_channels_is_undone(
    samples: int, channels: int, places: list[int], seed: int
) -> None:
    """Without a ridge, d^T h C^-1 of A h is d^T h C^-1 times A^-1, so that the readout of the activity stays."""
    generator = torch.Generator().manual_seed(seed)
    M = samples + channels  # enough for an invertible covariance
    h = torch.randn(M, channels, *places, generator=generator, dtype=F64)
    A = torch.linalg.qr(torch.randn(channels, channels, generator=generator, dtype=F64))[0]
    A = A @ torch.diag(0.5 + torch.rand(channels, generator=generator, dtype=F64))
    mixed = torch.einsum("ab,mb...->ma...", A, h)
    shape = tuple(h.shape[1:])
    plain, found = (whitened(site(shape), t, True, 1e-12) for t in (h, mixed))
    torch.testing.assert_close(torch.einsum("ab,ma...->mb...", A, found), plain)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_channels_become_uncorrelated(scale: float) -> None:
    h = (scale * torch.randn(50, 4, 3)).to(F64)
    made, seen = (
        t.movedim(1, -1).flatten(0, -2)
        for t in (whitened(site((4, 3)), h, True, 1e-12), h - h.mean(0))
    )
    product = made.t() @ seen / len(seen)
    torch.testing.assert_close(product, torch.eye(4, dtype=F64), atol=1e-9, rtol=0)


@pytest.mark.parametrize("h", [torch.zeros(4, 3, 2, 2), torch.ones(4, 3, 2, 2)])
def test_what_does_not_vary_gives_nothing(h: Tensor) -> None:
    assert not whitened(site((3, 2, 2)), h, True, 0.1).any()


def test_channels_that_are_copies_are_kept_apart_by_the_ridge() -> None:
    h = torch.randn(20, 1, 3, 3).repeat(1, 4, 1, 1)
    assert whitened(site((4, 3, 3)), h, True, 0.1).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(dtype: torch.dtype) -> None:
    h = torch.randn(20, 4, 3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = whitened(site((4, 3, 3)), h.to(dtype), True, 0.1)
    assert made.dtype == torch.float32
    torch.testing.assert_close(made, whitened(site((4, 3, 3)), h, True, 0.1), atol=0.05, rtol=0.05)


def test_the_layout_does_not_matter() -> None:
    h = torch.randn(20, 4, 3, 3, dtype=F64)
    last = h.contiguous(memory_format=torch.channels_last)
    made = [whitened(site((4, 3, 3)), t, True, 0.1) for t in (h, last)]
    torch.testing.assert_close(*made)


def test_values_that_are_not_finite_stay_so() -> None:
    """So that training stops for the loss, with its own words."""
    h = torch.full((4, 3, 2, 2), float("nan"))
    assert whitened(site((3, 2, 2)), h, True, 0.1).isnan().all()


@pytest.mark.parametrize("ridge", [0.0, -0.1, float("nan")])
def test_a_ridge_that_is_not_above_zero_is_refused(ridge: float) -> None:
    with pytest.raises(fb.AttachError, match="ridge"):
        fb.DKP(ridge=ridge)
