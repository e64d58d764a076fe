"""A few of the faults of bench/faults.py; docs/reliability.md has them all."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from data_files import folder_of

from feedbackward.experiment.data import DataConfig, load_data

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="bench/faults.py forks")
@pytest.mark.parametrize(
    "arguments", [["kill", "--phases", "checkpoint"], ["term", "--phases", "st"]]
)
def test_a_broken_run_ends_as_a_whole_one(arguments: list[str]) -> None:
    """The script compares both ends, bit by bit."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "faults.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bit-equal" in done.stdout


def test_what_a_killed_write_left_is_removed_an_hour_later(tmp_path, cache_folder) -> None:
    root = folder_of(tmp_path / "pets", "train", {"cat": 9, "dog": 9})
    for name, age in ((".writing-old", 4000), (".writing-new", 0)):
        (cache_folder / name).mkdir(parents=True)
        (cache_folder / name / "part").write_bytes(b"0" * 100)
        os.utime(cache_folder / name, (time.time() - age,) * 2)
    load_data(DataConfig(str(root)))
    assert [path.name for path in cache_folder.glob(".writing-*")] == [".writing-new"]
