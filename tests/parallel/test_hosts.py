"""Several hosts, as network namespaces of one machine: they train together, and a link that is cut stops all in time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import needs_gloo

pytestmark = needs_gloo
SCRIPT = Path(__file__).parents[2] / "bench" / "hosts.py"


@pytest.mark.nightly
def test_a_link_is_cut() -> None:
    env = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1] / "src")}
    command = [sys.executable, str(SCRIPT), "--hosts", "2"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=320)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    if lines[-1].startswith("not run"):
        pytest.skip(lines[-1])
    told = dict(line.split(": ", 1) for line in lines)
    whole, cut = (json.loads(told[key]) for key in ("undisturbed", "cut"))
    assert [host["lost"] for host in whole] == [None, None]
    assert whole[0]["loss"] == whole[1]["loss"]
    # each has lost the other, after the timeout of 8 seconds and soon
    assert [host["lost"] for host in cut] == [1, 0]
    assert all(10 <= host["steps"] < whole[0]["steps"] for host in cut)
    assert all(7 < host["seconds"] < 30 for host in cut)
