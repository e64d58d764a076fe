"""The model card of a run: read as the hub reads it, and its code run as a reader runs it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from feedbackward.cli import main
from feedbackward.experiment.data.dataset import DataConfig, load_data

SMALL = ["--model", "mlp64", "--epochs", "1", "--threads", "1", "--no-tensorboard"]


def trained(*arguments: str, out: str = "run") -> Path:
    assert main(["train", *SMALL, "--out", out, *arguments]) == 0
    return Path(out)


def use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """The model that the card's own code makes, in the folder of the card."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    names: dict[str, torch.nn.Module] = {}
    with monkeypatch.context() as within:
        within.chdir(folder)
        exec(code, names)
    return names["model"]


def test_a_reader_gets_the_accuracy_of_the_card(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = ["--data.train-limit", "300", "--data.test-limit", "200"]
    folder = trained("--rule", "dkp", *limits)
    card = ModelCard.load(folder / "README.md")
    assert len(card.content.splitlines()) < 100
    (found,) = card.data.eval_results
    assert card.data.metrics == ["accuracy"] == [found.metric_type]
    assert {"library_name", "tags", "pipeline_tag"} <= {*card.data.to_dict()}
    assert "license" not in card.data.to_dict()
    # pixels as the card says
    mean, std = (json.loads(re.search(rf"{n} (\[.*?\])", card.text)[1]) for n in ("mean", "std"))
    data = load_data(DataConfig(train_limit=300, test_limit=200))
    x = (data.test.images.double() / 255 - torch.tensor(mean)) / torch.tensor(std)
    with torch.no_grad():
        guess = use(folder, monkeypatch)(x.float()).argmax(1)
    share = 100 * (guess == data.test.labels).double().mean().item()
    assert found.metric_value == pytest.approx(share)
    assert f"accuracy {share:.2f} %" in card.text
    (last,) = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert (
        f"held out (rates may have been chosen on it) | accuracy {last['validation_accuracy']:.2f} %"
        in card.text
    )
    assert json.dumps(data.classes) in card.text
    assert "(1, 28, 28)" in card.text
    assert "Webster" in card.text


def test_a_card_is_written_once_and_replaced_with_its_run(home: Path) -> None:
    card = trained("--rule", "bp", "--data.train-limit", "100") / "README.md"
    assert "It has no feedback weights." in card.read_text()
    card.write_text("mine")
    trained("--rule", "bp", "--data.train-limit", "100", "--resume")
    assert card.read_text() == "mine"
    card.unlink()
    trained("--rule", "bp", "--data.train-limit", "100", "--resume")
    assert ModelCard.load(card).data.library_name == "feedbackward"
    trained("--rule", "dfa", "--data.train-limit", "100", "--overwrite")
    assert "by DFA" in card.read_text()


def test_own_data_and_own_names(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes may be called anything, and no folder of the machine is named."""
    names = ["```", "a|b", "ä: {{ 1 }}"]
    for split, each in (("train", 4), ("test", 2)):
        for label, name in enumerate(names):
            place = home / "secret" / "my images" / split / name
            place.mkdir(parents=True)
            for i in range(each):
                pixels = np.full((8, 8), 20 * label + i, dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.png")
    folder = trained(
        "--rule", "drtp", "--data", str(home / "secret" / "my images"), "--batch-size", "4"
    )
    card = ModelCard.load(folder / "README.md")
    assert str(home) not in card.content
    assert "secret" not in card.content
    assert "my images" in card.text
    (listed,) = re.findall(r"```json\n(.*)\n```", card.text)
    assert sorted(json.loads(listed)) == sorted(names)
    assert card.data.datasets is None
    # gray files are read as colours
    assert use(folder, monkeypatch)(torch.zeros(1, 3, 8, 8)).shape == (1, 3)


def test_a_text(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "text.txt").write_text("abcab " * 400)
    text = str(home / "text.txt")
    data = ["--data", text, "--data.context", "8", "--rule", "dfa"]
    folder = trained("--task", "language_model", "--model", "transformer_small", *data)
    card = ModelCard.load(folder / "README.md")
    assert card.data.eval_results[0].metric_type == "perplexity"
    assert str(home) not in card.content
    assert use(folder, monkeypatch)(torch.zeros(1, 8, dtype=torch.int64)).shape == (1, 8, 4)
