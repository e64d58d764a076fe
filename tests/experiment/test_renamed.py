"""Commands of 0.1.0: they work for one release, and print the new spelling."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from feedbackward.cli import main
from feedbackward.experiment.config.renamed import renamed


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("bench mlp --rounds 2", "cost mlp --rounds 2 --measure"),
        (
            "study paper --rules bp,dkp --seeds 0 --list --out x",
            "compare --config=paper --only.rules bp,dkp --only.seeds 0 --dry-run --out x",
        ),
        (
            "study my/own.yaml --scale 0.050 --set epochs=1 --set=batch_size=7",
            "compare --config=my/own.yaml --scale 0.050 --epochs=1 --batch-size=7"
            " --out=runs/study-own-0.05",
        ),
        ("train --lr 0.1", "train --lr 0.1"),
    ],
)
def test_old_commands_are_written_as_new_ones(old: str, new: str, capsys: Any) -> None:
    command, *arguments = shlex.split(old)
    found, rest = renamed(command, arguments)
    assert shlex.join([found, *rest]) == new
    said = capsys.readouterr().err
    assert said.count("\n") == (found != command)
    assert f"feedbackward {new}\n" in said or found == command


def test_an_old_command_runs(home: Path, capsys: Any) -> None:
    assert main(["study", "paper", "--models", "vgg16", "--list"]) == 0
    out, err = capsys.readouterr()
    assert "VGG-16-BN" in out
    assert err.startswith("feedbackward: 'study' is now 'compare'")
