"""`feedbackward cost --stages`: the table, the files and the refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from feedbackward.cli import main
from feedbackward.parallel import SCHEDULES

NET = ["cost", "mlp", "--size", "8", "--channels", "1", "--batch", "16", "--classes", "3"]


def test_table_and_files(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--stages", "2,16", "--micro-batches", "4", "--link", "100", "--latency", "1"]
    assert main([*NET, *flags, "--json", "stages.json", "--plot", "stages.png"]) == 0
    printed = capsys.readouterr().out
    assert "2 stages, batch 16 in 4, links of 100 Mbit/s, 1 ms" in printed
    assert "16 stages (equal parts of" in printed
    assert (home / "stages.png").stat().st_size > 10000
    for entry in json.loads((home / "stages.json").read_text())["models"]:
        rows = {row["schedule"]: row for row in entry["rows"]}
        assert list(rows) == list(SCHEDULES)
        # 4 samples of a micro-batch, 3 classes, 4 bytes, 4 micro-batches
        assert rows["star"]["backward_bytes"] == 4 * 3 * 4 * 4
        assert rows["local"]["backward_bytes"] == 0
        assert rows["1f1b"]["backward_bytes"] == rows["1f1b"]["forward_bytes"] > 0
        assert rows["star"]["isolated"] <= rows["gpipe"]["isolated"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--stages", "0"], "at least 1"),
        (["--stages", "2", "--micro-batches", "16"], "at most 8 parts"),
        (["--stages", "2", "--measure"], "two commands"),
        (["--stages", "2", "--link", "0"], "above 0"),
    ],
)
def test_refusals(
    home: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    assert main([*NET, *flags]) == 2
    assert words in capsys.readouterr().err
