"""One thread per test process: the nets are tiny, and tests run in parallel processes."""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEEDBACKWARD_CACHE", str(tmp_path / "cache"))
    return tmp_path
