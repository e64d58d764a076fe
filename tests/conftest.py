"""One thread per test process: the nets are tiny, and tests run in parallel processes."""

from __future__ import annotations

import zlib
from collections import Counter
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick",
        action="store_true",
        help="no test marked nightly, and of a test with more than eight variations a third, unless it is marked whole",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The sample is the same on every machine, and has the first variation of each test."""
    if not config.getoption("--quick"):
        return
    variations = Counter(item.nodeid.partition("[")[0] for item in items)
    chosen: dict[bool, list[pytest.Item]] = {True: [], False: []}
    seen = set()
    for item in items:
        name = item.nodeid.partition("[")[0]
        whole = variations[name] <= 8 or item.get_closest_marker("whole") is not None
        lucky = zlib.crc32(item.nodeid.encode()) % 3 == 0 or name not in seen
        nightly = item.get_closest_marker("nightly") is not None
        chosen[not nightly and (whole or lucky)].append(item)
        seen.add(name)
    items[:] = chosen[True]
    config.hook.pytest_deselected(items=chosen[False])


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
