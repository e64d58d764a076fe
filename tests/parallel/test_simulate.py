"""The simulator against closed formulas, and the laws that hold for any stages and links."""

from __future__ import annotations

import itertools
import math

import pytest
from examples import examples
from hypothesis import example, given
from hypothesis import strategies as st

import feedbackward as fb
from feedbackward.parallel import SCHEDULES, Link, StageCost, simulate
from feedbackward.parallel.simulate import balanced, spread

F, D, G, U = 1.0, 0.71, 1.16, 0.03
BACKPROP = ("gpipe", "1f1b", "zero-bubble")


def same(stages: int) -> list[StageCost]:
    return [StageCost(F, D, G, U)] * stages


@pytest.mark.parametrize(("S", "M"), [(1, 3), (2, 4), (3, 3), (4, 8), (8, 16), (5, 5)])
def test_closed_formulas(S: int, M: int) -> None:
    """Balanced stages and free links: the formulas of the schedules."""
    for name in ("gpipe", "1f1b"):
        found = simulate(name, same(S), M)
        assert found.isolated == pytest.approx((M + S - 1) * (F + D + G) + U)
        assert found.steady == pytest.approx((M + S - 1) * (F + D + G) + U)
    star = simulate("star", same(S), M)
    assert star.isolated == pytest.approx((S - 1) * F + M * (F + G) + U)
    longest = max(M * (F + G) + U, S * F + M * G + U, (S + M - 1) * F + G + U)
    # between two steps of equal stages the ranks drift apart by less than an update
    assert star.steady == pytest.approx(longest, abs=(S - 1) * U + 1e-9)
    local = simulate("local", same(S), M)
    assert local.steady == pytest.approx(M * (F + G) + U)
    bubble = simulate("zero-bubble", same(S), M)
    assert M * (F + D + G) <= bubble.steady <= simulate("1f1b", same(S), M).steady + 1e-9


def test_the_last_rank_fills_its_waits() -> None:
    """It is quicker with a forward than the rank below, and runs a backward where it would wait: it works from the
    arrival of the first input to the end."""
    stages = [StageCost(1.0, 0.0, 1.0), StageCost(0.5, 0.0, 1.5)]
    assert simulate("star", stages, 4).isolated == pytest.approx(1.0 + 4 * (0.5 + 1.5))
    # a rank that waits for errors cannot; with local losses, none waits for errors
    three = [StageCost(1.0, 0.0, 0.5), StageCost(0.5, 0.0, 1.0), StageCost(0.5, 0.0, 0.5)]
    assert simulate("local", three, 4).isolated == pytest.approx(1.0 + 4 * (0.5 + 1.0))
    assert simulate("star", three, 4).isolated == pytest.approx(4 * 1.0 + 0.5 + 4 * 1.0)


def test_links() -> None:
    """Two stages, one micro-batch: the way there and back is added to what is computed."""
    link = Link(bandwidth=100.0, latency=0.5)
    stages = [StageCost(1.0, 0.7, 1.2, sends=200), StageCost(1.0, 0.7, 1.2)]
    there, back = 200 / 100 + 0.5, 10 / 100 + 0.5
    star = simulate("star", stages, 1, links=link, error_bytes=10)
    assert star.isolated == pytest.approx(1.0 + there + 1.0 + max(1.2, back + 1.2))
    assert (star.forward_bytes, star.backward_bytes) == (200, 10)
    backprop = simulate("gpipe", stages, 1, links=link)
    assert backprop.isolated == pytest.approx(1.0 + there + 1.0 + 1.9 + there + 1.9)
    assert backprop.backward_bytes == 200
    assert simulate("local", stages, 1, links=link).backward_bytes == 0


def test_activities_that_are_held() -> None:
    stages = [StageCost(1.0, 1.0, 1.0, holds=10)] * 4
    assert simulate("gpipe", stages, 8).held == (80,) * 4
    assert simulate("1f1b", stages, 8).held == (40, 30, 20, 10)
    assert simulate("star", stages, 8).held == (80,) * 4
    assert simulate("star-few", stages, 8).held == (40, 30, 20, 10)


costs = st.floats(0.1, 3.0)
pipelines = st.lists(st.tuples(costs, costs, costs), min_size=1, max_size=5)


# two stages of nearly the same work, the lower of which ends the first steps
@example([(1.96875, 1.0, 1.125), (1.40625, 1.0, 1.75), (1.0, 1.0, 1.0)], 2, 0.0)
@examples(40, 400)
@given(pipelines, st.integers(1, 6), st.floats(0.0, 1.0))
def test_laws(parts: list[tuple[float, float, float]], M: int, latency: float) -> None:
    stages = [StageCost(*part, sends=8) for part in parts]
    link = Link(bandwidth=50.0, latency=latency)
    for name in SCHEDULES:
        found = simulate(name, stages, M, links=link, error_bytes=4)
        gradients = [s.inputs if name in BACKPROP else 0.0 for s in stages]
        busiest = max(
            M * (s.forward + g + s.weights) for s, g in zip(stages, gradients, strict=True)
        )
        assert busiest <= found.steady * (1 + 1e-9)
        assert found.steady <= found.isolated * (1 + 1e-9)
        assert 0 <= found.bubble < 1
        slower = simulate(name, stages, M, links=Link(25.0, 2 * latency), error_bytes=4)
        assert slower.isolated >= found.isolated - 1e-9
    star, backprop = (simulate(n, stages, M, links=link, error_bytes=4) for n in ("star", "gpipe"))
    assert star.isolated <= backprop.isolated + 1e-9


@examples(60, 600)
@given(st.lists(st.floats(0.1, 5.0), min_size=1, max_size=8), st.integers(1, 8))
def test_balance_is_the_best_there_is(times: list[float], stages: int) -> None:
    if stages > len(times):
        stages = len(times)

    def slowest(cut: tuple[int, ...]) -> float:
        bounds = [0, *(place + 1 for place in cut), len(times)]
        return max(sum(times[a:b]) for a, b in itertools.pairwise(bounds))

    every = itertools.combinations(range(len(times) - 1), stages - 1)
    assert slowest(balanced(times, stages)) == pytest.approx(min(map(slowest, every)))


def test_more_stages_than_segments() -> None:
    """They are equal parts of the whole; and a thousand of them are simulated soon."""
    segments = [StageCost(1.0, 2.0, 3.0, sends=8, holds=100)] * 4
    parts = spread(segments, 1024)
    assert len(parts) == 1024
    assert math.isclose(sum(part.weights for part in parts), 12.0)
    found = simulate("star", parts, 4, steps=4)
    assert found.isolated == pytest.approx(1023 * 4 / 1024 + 4 * (4 + 12) / 1024)


def test_refusals() -> None:
    for schedule, stages, parts in (
        ("dual-pipe", same(2), 2),
        ("star", [], 2),
        ("star", same(2), 0),
    ):
        with pytest.raises(fb.FeedbackError):
            simulate(schedule, stages, parts)  # type: ignore[arg-type]
    with pytest.raises(fb.FeedbackError, match="2 stages have 1 links"):
        simulate("star", same(2), 2, links=[Link(), Link()])
