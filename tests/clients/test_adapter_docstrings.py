"""The examples in the docstrings of the adapters."""

from __future__ import annotations

import doctest
import warnings
from importlib import import_module

import pytest
from client_nets import needed

pytestmark = pytest.mark.clients


@pytest.mark.parametrize(
    ("package", "module", "name"),
    [
        ("transformers", "huggingface", "FeedbackMixin"),
        ("lightning", "lightning", "FeedbackCallback"),
    ],
)
def test_example_of_an_adapter(package: str, module: str, name: str) -> None:
    needed(package)
    found = import_module(f"feedbackward.integrations.{module}")
    (example,) = [t for t in doctest.DocTestFinder().find(getattr(found, name), name) if t.examples]
    # a reader starts from an empty session
    example.globs = {"__name__": "__main__"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = doctest.DocTestRunner(verbose=False).run(example)
    assert result.attempted > 5
    assert result.failed == 0
