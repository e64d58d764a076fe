"""Every example is short, and runs as a user runs it; each asserts what it claims."""

from __future__ import annotations

import os
import runpy
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from ranks import CONTEXT

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.whole
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path: Path, tmp_path: Path) -> None:
    assert len(path.read_text().splitlines()) < 60
    printed = tmp_path / "printed.txt"
    process = CONTEXT.Process(target=_run, args=(path, printed))
    process.start()
    process.join()
    assert process.exitcode == 0, printed.read_text()
    assert printed.read_text()


def _run(path: Path, printed: Path) -> None:
    """As a process of its own that has imported the package already."""
    os.chdir(printed.parent)
    with printed.open("w") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            runpy.run_path(str(path), run_name="__main__")
        except BaseException:
            traceback.print_exc()
            raise
