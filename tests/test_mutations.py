"""The tests catch defects: see `mutations`."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mutations import MUTATIONS, PACKAGE, TESTS


@pytest.mark.parametrize(("file", "old", "new", "test"), MUTATIONS)
def test_mutation_applies(file: str, old: str, new: str, test: str) -> None:
    """Its old text is there exactly once, so the list is as current as the code."""
    assert (PACKAGE / file).read_text().count(old) == 1
    assert old != new
    assert (TESTS / test).exists()


@pytest.mark.slow
@pytest.mark.timeout(900)  # under a minute on an idle core
def test_every_mutation_is_caught() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TESTS / "mutations.py")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=TESTS.parent)
    assert result.returncode == 0, result.stdout + result.stderr
