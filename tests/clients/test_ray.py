"""The cells of a grid as tasks of Ray, on a cluster of two nodes in processes of this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from client_nets import needed

from feedbackward.cli import main

pytestmark = pytest.mark.clients
ray = needed("ray")

NET = """
import os
from pathlib import Path
import ray
import torch
from torch import nn

def net(in_shape, classes):
    Path(f"node-{ray.get_runtime_context().get_node_id()}" if ray.is_initialized() else "here").touch()
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, classes))

def dying(in_shape, classes):
    if torch.initial_seed() == 1:
        os._exit(3)
    return net(in_shape, classes)
"""
TIMES = {"seconds", "images_per_second", "created", "command", "config"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one CPU."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        node = {"num_cpus": 1, "object_store_memory": 10**8}
        found = Cluster(initialize_head=True, head_node_args=node)
        found.add_node(**node)
        patch.setenv("RAY_ADDRESS", found.address)
        ray.init(address=found.address, log_to_driver=False)
        yield found
        ray.shutdown()
        found.shutdown()


def arguments(net: str, epochs: int, *more: str) -> list[str]:
    given = {
        "model": f"nets_of_ray:{net}", "data.train-limit": 80, "data.validation": 40, "data.test-limit": 40, "data.size": 8,
        "rules": "bp,dkp", "seeds": "0,1", "epochs": epochs, "batch-size": 20, "timing-steps": 0, "out": "out",
        "tensorboard": "false",
    }  # fmt: skip
    return ["compare", *(f"--{name}={value}" for name, value in given.items()), *more]


def results() -> Any:
    return json.loads(Path("out/results.json").read_text())


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: timeless(held) for key, held in value.items() if key not in TIMES}
    return [timeless(held) for held in value] if isinstance(value, list) else value


def weights() -> dict[str, bytes]:
    return {f.parent.name: f.read_bytes() for f in Path("out").rglob("model.safetensors")}


@pytest.fixture
def place(home: Path) -> Path:
    (home / "nets_of_ray.py").write_text(NET)
    return home


def test_results_are_those_of_the_local_processes(place: Path, cluster: Any) -> None:
    search = ["--search", "--search.lr=0.01,0.1", "--search.feedback-lr=0.01", "--search.epochs=1"]
    assert main(arguments("net", 2, "--workers=2", *search)) == 0
    document, held = timeless(results()), weights()
    shutil.rmtree("out")
    assert main(arguments("net", 2, "--executor=ray", *search)) == 0
    assert json.dumps(timeless(results())) == json.dumps(document)
    assert weights() == held
    assert len(held) == 4 + 2 * 2
    # by default as many at once as the cluster has CPUs
    assert len([*Path().glob("node-*")]) == 2


def test_a_cell_whose_worker_dies_fails_alone(place: Path, cluster: Any) -> None:
    assert main(arguments("dying", 1, "--executor=ray")) == 1
    for rule in results()["rules"]:
        whole, died = rule["runs"]
        assert whole["status"] == "done"
        assert died["status"] == "failed"
        assert "its Ray task died (WorkerCrashedError)" in died["message"]


def test_ctrl_c_leaves_what_goes_on(place: Path, cluster: Any) -> None:
    """Sent to the whole group of processes, as a terminal does; the cells save themselves."""
    command = [sys.executable, "-m", "feedbackward", *arguments("net", 150, "--executor=ray")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    until = time.monotonic() + 200
    while not [*Path("out").glob("*/metrics.jsonl")] and time.monotonic() < until:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 128 + signal.SIGINT, printed
    assert "go on with" in printed
    assert [*Path("out").glob("*/checkpoint.safetensors")]
    assert not weights()
    assert main(arguments("net", 150, "--executor=ray")) == 0
    held = weights()
    shutil.rmtree("out")
    assert main(arguments("net", 150, "--workers=1")) == 0
    assert weights() == held


def test_a_cell_too_large_for_every_node_is_refused(place: Path, cluster: Any, capsys: Any) -> None:
    assert main(arguments("net", 1, "--executor=ray", "--threads=64")) == 2
    assert "a cell takes 64 CPUs, and no node" in capsys.readouterr().err


def test_without_ray_the_extra_is_named(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(arguments("net", 1, "--executor=ray")) == 2
    assert "pip install 'feedbackward[ray]'" in capsys.readouterr().err
