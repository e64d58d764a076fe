"""The tests catch defects: see `mutations`."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from mutate import PACKAGE, TESTS, place
from mutations import MUTATIONS


@pytest.mark.whole
@pytest.mark.parametrize(("file", "old", "new", "test"), MUTATIONS)
def test_mutation_applies(file: str, old: str, new: str, test: str) -> None:
    """Its old text is there exactly once, so the list is as current as the code."""
    assert place((PACKAGE / file).read_text(), old)
    assert old != new
    assert (TESTS / test).exists()


@pytest.mark.slow
@pytest.mark.skipif("MUTATIONS" not in os.environ, reason="about ten minutes: make mutations")
@pytest.mark.timeout(3600)
def test_every_mutation_is_caught() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TESTS / "support" / "mutate.py")]
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=TESTS.parent
    )
    assert result.returncode == 0, result.stdout + result.stderr
