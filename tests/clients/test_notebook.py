"""The notebook runs as Jupyter runs it, and is kept with what it shows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from client_nets import needed

pytestmark = pytest.mark.clients
nbclient = needed("nbclient")
needed("ipykernel")
nbformat = needed("nbformat")

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "first_look.ipynb"


def shown(notebook: Any) -> list[list[str]]:
    """The kinds of what each cell of code shows; streams come in any number of pieces."""
    cells = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    return [sorted({"/".join(sorted(o.get("data", [o.output_type]))) for o in c}) for c in cells]


def test_the_notebook_runs_and_shows_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    )
    kept = nbformat.read(NOTEBOOK, as_version=4)
    fresh = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        fresh, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    assert shown(fresh) == shown(kept)
    assert any("image/png" in kinds for cell in shown(kept) for kinds in cell)
    assert NOTEBOOK.stat().st_size < 100_000
