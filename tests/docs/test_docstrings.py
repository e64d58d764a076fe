"""The examples in the public docstrings run and print what they say."""

from __future__ import annotations

import doctest

import pytest

import feedbackward as fb

WITH_EXAMPLE = [
    fb.attach,
    fb.Learner.backward,
    fb.param_groups,
    fb.probe,
    fb.count_cost,
    fb.Delayed,
    fb.DKP,
    fb.DFA,
    fb.KolenPollack,
    fb.RelayedKP,
    fb.DGL,
]


@pytest.mark.parametrize("thing", WITH_EXAMPLE, ids=lambda thing: thing.__qualname__)
def test_example_in_docstring(thing: object) -> None:
    (found,) = doctest.DocTestFinder(recurse=False).find(thing, globs={})
    assert found.examples
    assert doctest.DocTestRunner(verbose=False).run(found).failed == 0
