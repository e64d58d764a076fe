"""What a result was computed with: versions, hardware and the commit of the code."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from feedbackward import __version__

_LIBRARIES = ("numpy", "datasets", "safetensors")


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, processor, device and commit, ready for JSON."""
    versions = {name: _version(name) for name in _LIBRARIES}
    return {
        "feedbackward": __version__,
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version for name, version in versions.items() if version},
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "device_memory_bytes": torch.cuda.get_device_properties(device).total_memory
        if device.type == "cuda"
        else None,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "command": command_line(),
    }


def command_line() -> str:
    """The command line that this is."""
    name = Path(sys.argv[0]).name
    return shlex.join(["feedbackward" if name == "__main__.py" else name, *sys.argv[1:]])


def git_commit() -> str | None:
    """The commit of this package's checkout, else of the working directory; "-dirty" with local changes."""
    package = Path(__file__).resolve().parent
    tracked = _git(package, "ls-files", "--error-unmatch", __file__) is not None
    folder = package if tracked else Path.cwd()
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return commit + ("-dirty" if changed else "")


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints, or None where it fails or is not installed."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    """The processor's own name where Linux tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory() -> int | None:
    """Bytes of the machine's main memory, where the system tells."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
