"""A few of the faults of bench/faults.py; docs/reliability.md has them all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from data_files import folder_of

from feedbackward import cli
from feedbackward.experiment.data import DataConfig, decode, load_data

ROOT = Path(__file__).parents[2]


@pytest.mark.single
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


@pytest.mark.single
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["train", "compare"])
def test_a_signal_while_images_are_decoded_stops_at_once(
    tmp_path, cache_folder, monkeypatch, capsys, command: str, signum: int
) -> None:
    """No further image is decoded, nothing is left in the cache, and the same command goes on."""
    root = folder_of(tmp_path / "pets", "train", {"cat": 9, "dog": 9})
    arguments = [command, "--model=mlp", f"--data.name={root}", "--epochs=1", "--batch-size=4"]
    arguments += (
        ["--resume", "--rule=dfa"] if command == "train" else ["--rules=[dfa]", "--workers=1"]
    )
    arguments += ["--tensorboard=false", f"--out={tmp_path / 'run'}"]
    whole, seen = decode.image_to_array, []

    def third_is_signalled(*given):
        seen.append(given)
        if len(seen) == 3:
            signal.raise_signal(signum)
        return whole(*given)

    monkeypatch.setattr(decode, "image_to_array", third_is_signalled)
    assert cli.main(arguments) == 128 + signum
    assert len(seen) == 3
    assert not [path for path in cache_folder.rglob("*") if path.is_file()]
    assert "go on with" in capsys.readouterr().err
    assert cli.main(arguments) == 0
