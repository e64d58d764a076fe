"""Orthogonal feedback: against singular values in numpy, for every form that it may have."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from forms import FORMS, Form

import feedbackward as fb
from feedbackward.operators import Orthogonal

# what a rule may learn, and what sends by a matrix
LEARNABLE = [form for form in FORMS if form.operator.learnable and form.operator.linear]


def polar(B: np.ndarray) -> np.ndarray:
    """Ten steps of Newton and Schulz on the singular values of B, divided by its norm."""
    u, s, v = np.linalg.svd(B / np.linalg.norm(B), full_matrices=False)
    for _ in range(10):
        s = s * (3 - s**2) / 2
    return (u * s) @ v


@pytest.mark.parametrize("strength", [0.5, 3.0])
@pytest.mark.parametrize("form", LEARNABLE, ids=str)
def test_it_sends_by_the_orthogonal_matrix_next_to_the_dense_one(
    form: Form, strength: float
) -> None:
    operator = Orthogonal(form.operator, strength).fit(form.source, form.site, 5)
    weights, (d, _) = form.weights(), form.pass_()
    dense = form.dense(form.fitted(), weights, form.source, form.site).numpy()
    expected = strength * d.flatten(1).numpy() @ polar(dense)
    found = operator.send(weights, d, form.site)
    np.testing.assert_allclose(found.flatten(1).numpy(), expected, atol=1e-10)


@pytest.mark.parametrize("form", LEARNABLE, ids=str)
def test_the_rest_is_that_of_the_form(form: Form) -> None:
    plain, operator = form.fitted(), Orthogonal(form.operator).fit(form.source, form.site, 5)
    assert (operator.parts, operator.learnable) == (plain.parts, plain.learnable)
    assert (operator.sized, operator.common) == (plain.sized, plain.common)
    weights, (d, h) = form.weights(), form.pass_()
    for made in ("correlate", "decay"):
        arguments = (d, h, True) if made == "correlate" else (form.source, form.site)
        pair = (getattr(o, made)(weights, *arguments) for o in (plain, operator))
        for a, b in zip(*pair, strict=True):
            assert torch.equal(a, b)
    assert operator.bytes(form.source, form.site) == form.bytes


def test_zero_sends_nothing_and_no_nan() -> None:
    operator = Orthogonal(fb.Dense("zeros"))
    weights = operator.create((4,), (7,), torch.Generator())
    assert torch.equal(operator.send(weights, torch.randn(5, 4), (7,)), torch.zeros(5, 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_any_dtype(dtype: torch.dtype) -> None:
    operator = Orthogonal(fb.Dense(), strength=1.0)
    B = operator.create((10,), (300,), torch.Generator().manual_seed(0))[0].to(dtype)
    sent = operator.send((B,), torch.eye(10, dtype=dtype), (300,))
    assert sent.dtype == dtype
    assert (sent.float() @ sent.float().t() - torch.eye(10)).abs().max() < 0.05


def test_a_wide_source_keeps_its_directions() -> None:
    """The products of a step grow with the third power of the source's units: Dense gets the norm alone."""
    assert Orthogonal(fb.Dense()).fit((1024,), (3,), 0) == Orthogonal(fb.Dense())
    assert Orthogonal(fb.LowRank(2)).fit((1025,), (3,), 0) == fb.LowRank(2)
    operator = Orthogonal(fb.Dense(), 0.5).fit((1025,), (3,), 0)
    generator = torch.Generator().manual_seed(0)
    B, d = torch.randn(1025, 3, generator=generator), torch.randn(2, 1025, generator=generator)
    expected = 0.5 * d.numpy() @ B.numpy() * math.sqrt(1025) / np.linalg.norm(B.numpy())
    np.testing.assert_allclose(operator.send((B,), d, (3,)).numpy(), expected, rtol=1e-4)
    assert not operator.send((0 * B,), d, (3,)).any()
    assert operator.macs_per_pass((1025,), (3,)) == 0


def test_its_cost_is_counted() -> None:
    steps, gram = 30 * 1000, 100 * 7
    assert Orthogonal(fb.Dense()).macs((10,), (7,)) == 70
    assert Orthogonal(fb.Dense()).macs_per_pass((10,), (7,)) == gram + steps
    # to be made dense, the others send the ten units
    assert Orthogonal(fb.Sparse(2)).macs_per_pass((10,), (7,)) == 10 * 14 + gram + steps
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 10))
    x = torch.randn(8, 5)
    found = [
        fb.count_cost(fb.attach(model, rule, example=x), x).feedback
        for rule in (fb.DKP(), fb.DKP(orthogonal=False))
    ]
    assert found == [8 * 70 + gram + steps, 8 * 70]


def test_the_strength_is_an_option_of_the_rule() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 10))
    learner = fb.attach(model, fb.DKP(strength=2.0), example=torch.randn(8, 5))
    (edge,) = learner.graph.edges
    assert edge.operator == Orthogonal(fb.Dense("zeros"), 2.0)
