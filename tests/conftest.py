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
        help="no test marked nightly, of one marked single its first variation, and of one with more than four a fifth, unless it "
        "is marked whole",
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
        nightly, single, whole = (
            item.get_closest_marker(mark) is not None for mark in ("nightly", "single", "whole")
        )
        few = variations[name] <= 4 and not single
        lucky = zlib.crc32(item.nodeid.encode()) % 5 == 0 and not single
        chosen[not nightly and (whole or few or lucky or name not in seen)].append(item)
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
