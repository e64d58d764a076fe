"""Try the one-line defects of `mutations`: each is put into a copy of the package, and its test file must fail.

python tests/support/mutate.py                        # all of them
python tests/support/mutate.py whitening test_chain   # those whose file or test has one of these words

The copy comes first on the path of a fresh process, which runs the test file until its first failure.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

from mutations import MUTATIONS

TESTS = Path(__file__).resolve().parents[1]
PACKAGE = TESTS.parent / "src" / "feedbackward"


def _test(folder: str, test: str) -> None:
    """In a process of its own: run a test file against the package in `folder`; exit as pytest does."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.path.insert(0, folder)
    # of the processes that a test starts
    os.environ["PYTHONPATH"] = folder
    import pytest
    import torch

    torch.set_num_threads(1)
    options = ["-x", "--tb=no", "-k", "not resnet20"]
    for plugin in (
        "cacheprovider",
        "anyio",
        "unraisableexception",
        "threadexception",
    ):  # they cost more than the tests
        options += ["-p", f"no:{plugin}"]
    code = pytest.main([*options, str(TESTS / test)])
    import feedbackward

    if not str(feedbackward.__file__).startswith(folder):
        code = 99  # another copy was tested
    os._exit(int(code))


def place(text: str, old: str) -> re.Match[str]:
    """Where the old text stands, however the formatter broke its line. Raises ValueError unless it is there once."""
    gap = r"(?:\s|#[^\n]*\n)*"
    tokens = [re.escape(token) for token in re.findall(r"\w+|[^\w\s]", old)]
    pattern = gap.join(f",?{gap}{token}" if token == r"\)" else token for token in tokens)
    found = list(re.finditer(pattern, text))
    if len(found) != 1:
        raise ValueError(f"{old!r} stands {len(found)} times in the file")
    return found[0]


def outcome(test: str, mutation: tuple[str, str, str] | None = None) -> int:
    """pytest's exit code for one test file against a copy of the package, with the mutation if there is one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "pytest", "numpy"])
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "feedbackward"
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        if mutation is not None:
            file, old, new = mutation
            text = (copy / file).read_text()
            start, stop = place(text, old).span()
            (copy / file).write_text(text[:start] + new.lstrip() + text[stop:])
        process = context.Process(target=_test, args=(folder, test))
        process.start()
        process.join(240)
        if process.exitcode is None:
            process.kill()
            process.join()
        return process.exitcode if process.exitcode is not None else -1


def main(words: list[str]) -> int:
    """Report every mutation that its test file does not catch (anything but exit code 1)."""
    start, survivors = time.perf_counter(), 0
    chosen = [m for m in MUTATIONS if not words or any(w in m[0] or w in m[3] for w in words)]
    for test in sorted({mutation[3] for mutation in chosen}):
        if outcome(test) != 0:
            print(f"{test} fails without any mutation")
            return 2
    for file, old, new, test in chosen:
        code = outcome(test, (file, old, new))
        if code != 1:
            survivors += 1
            print(f"not caught by {test} (exit code {code}): {file}: {old!r} -> {new!r}")
    seconds = time.perf_counter() - start
    print(f"{len(chosen) - survivors} of {len(chosen)} caught in {seconds:.0f} s")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
