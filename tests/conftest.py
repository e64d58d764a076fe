"""One thread per test process: the nets are tiny, and tests run in parallel processes."""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, for decoded data sets."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("FEEDBACKWARD_CACHE", str(folder))
    return folder


@pytest.fixture
def home(tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with a cache of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
