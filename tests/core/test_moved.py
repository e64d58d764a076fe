"""Names of 0.1.0 still work, say the new name, and give the same object."""

from __future__ import annotations

import importlib
import sys

import pytest

import feedbackward as fb
from feedbackward.moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_a_moved_module_is_the_new_one(old: str) -> None:
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} has moved to {MOVED[old]}"):
        module = importlib.import_module(old)
    assert module is importlib.import_module(MOVED[old])
    assert module.__name__ == module.__spec__.name == MOVED[old]


@pytest.mark.parametrize(
    ("old", "new"), [("Stale", "Delayed"), ("cost", "count_cost"), ("Arc", "LayerInput")]
)
def test_a_renamed_name_is_the_new_one(old: str, new: str) -> None:
    with pytest.warns(
        DeprecationWarning,
        match=f"feedbackward.{old} will be removed in the next release: write .*{new}",
    ):
        assert getattr(fb, old) is getattr(fb, new)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Stalled'"):
        fb.Stalled  # noqa: B018
