"""docs/models.md says what is so: its rows are made again for a few models."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from client_nets import needed, torchvision_here

pytestmark = pytest.mark.clients
torchvision_here()
for package in ("timm", "transformers", "torch_geometric"):
    needed(package)

ROOT = Path(__file__).parents[2]
MODELS = ("mlp", "nn.TransformerEncoder", "nn.LSTM", "resnet18", "BERT", "GPT-2", "GCN", "EdgeCNN")


@pytest.mark.parametrize("name", MODELS)
def test_the_rows_of_a_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import models_table

    lines, reasons = models_table.rows((name,))
    page = (ROOT / "docs" / "models.md").read_text().splitlines()
    # "mlp" is a model of one package, and so is each of the others
    assert [line for line in page if f"| {name} | " in line] == [*lines, *reasons]
    sys.modules.pop("models_table")
