"""The trackers' own clients, offline: what `metrics.jsonl` has is what they have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from client_nets import needed
from test_loggers import expected
from test_train import StopAfter, config, run

from feedbackward.experiment.training.interrupts import InterruptedRunError

pytestmark = pytest.mark.clients
needed("tensorboard")


def stopped_and_resumed(tmp_path: Path, logger: str) -> list[tuple[int, dict[str, float]]]:
    """Train for two epochs in two parts, and return what there was to log."""
    settings = {"logger": logger, "epochs": 2}
    with pytest.raises(InterruptedRunError):
        run(config(tmp_path, **settings), StopAfter(8))
    run(config(tmp_path, **settings, resume=True))
    return expected(tmp_path / "run")


def as_series(rows: list[tuple[int, dict[str, float]]]) -> dict[str, list[tuple[int, Any]]]:
    series: dict[str, list[tuple[int, Any]]] = {}
    for epoch, values in rows:
        for name, value in values.items():
            series.setdefault(name, []).append((epoch, pytest.approx(value, rel=1e-5)))
    return series


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    series = as_series(stopped_and_resumed(tmp_path, "tensorboard"))
    found = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert {n: [(e.step, e.value) for e in found.Scalars(n)] for n in series} == series


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = needed("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    series = as_series(stopped_and_resumed(tmp_path, "mlflow"))
    client = mlflow.MlflowClient()
    # a resumed run is the same run
    (kept,) = client.search_runs(["0"])
    assert kept.info.run_name == "run"
    assert kept.info.status == "FINISHED"
    assert kept.data.params["rule"] == "dkp"
    for name, points in series.items():
        history = client.get_metric_history(kept.info.run_id, name)
        assert [(m.step, m.value) for m in history] == points, name


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    series = as_series(stopped_and_resumed(tmp_path, "wandb"))
    folders = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    ids = {folder.name.rpartition("-")[2] for folder in folders}
    # offline, each part is a folder, and both are of one run
    assert len(folders) == 2
    assert len(ids) == 1
    held = b"".join(file.read_bytes() for folder in folders for file in folder.glob("*.wandb"))
    assert all(name.encode() in held for name in series)
