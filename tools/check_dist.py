"""Check the files in dist/: what an index shows, and tests from the source distribution on the installed wheel.

python tools/check_dist.py   # after `python -m build`; `make dist` does both
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from email import message_from_string
from pathlib import Path

DIST = Path(__file__).parents[1] / "dist"
TESTS = (
    "tests/core/test_passes.py",
    "tests/rules/test_rules_direct.py",
    "tests/operators/test_operators.py",
    "tests/experiment/test_train.py",
    "tests/docs/test_docs.py::test_links_lead_somewhere",
    "tests/docs/test_docs.py::test_commands_parse",
)


def main() -> None:
    """Exit with an error at the first thing that is wrong."""
    (wheel,) = DIST.glob("*.whl")
    (source,) = DIST.glob("*.tar.gz")
    check_page(wheel)
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(source) as packed:
            packed.extractall(folder, filter="data")
        (unpacked,) = Path(folder).iterdir()
        python = installed(wheel, Path(folder) / "venv")
        for command in (
            # not the working tree by an editable installation
            ["-c", "import feedbackward; assert '/venv/' in feedbackward.__file__"],
            ["-m", "feedbackward", "compare", "--config", "smoke", "--out", f"{folder}/run"],
            ["-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "--quick", *TESTS],
        ):
            subprocess.run([python, *command], cwd=unpacked, check=True)


def check_page(wheel: Path) -> None:
    """No link of the index's page leads from the page itself."""
    with zipfile.ZipFile(wheel) as packed:
        (name,) = (n for n in packed.namelist() if n.endswith(".dist-info/METADATA"))
        page = message_from_string(packed.read(name).decode()).get_payload()
    relative = re.findall(r"\]\((?!https?:|#)[^)]*\)", page)
    if relative or "# feedbackward" not in page:
        sys.exit(f"the page of {wheel.name} has relative links: {relative}")


def installed(wheel: Path, venv: Path) -> Path:
    """The Python of a new environment with the wheel, and with this one's packages but not its feedbackward."""
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    python = venv / "bin" / "python"
    places = {"base": str(venv), "platbase": str(venv)}
    own = Path(sysconfig.get_path("purelib", vars=places))
    # editable installations are .pth files, which are read in an environment's own folder alone
    (own / "parent.pth").write_text(sysconfig.get_path("purelib"))
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True
    )
    return python


if __name__ == "__main__":
    main()
