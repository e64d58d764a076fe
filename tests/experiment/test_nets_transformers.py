"""Models of transformers by their type: `hf:vit`."""

import json

import pytest
import torch

from feedbackward.errors import ConfigError
from feedbackward.experiment.nets import build

pytest.importorskip("transformers")

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 7}
LM = {"n_embd": 16, "n_layer": 1, "n_head": 2}


def test_images_of_any_size_and_channels():
    model = build("hf:vit", (1, 28, 28), 5, options=TINY).double().eval()
    x = torch.randn(2, 1, 28, 28, dtype=torch.float64)
    assert torch.equal(model(x), model.model(pixel_values=x).logits)
    assert model(x).shape == (2, 5)
    assert model.model.config.hidden_size == 16


def test_a_language_model_has_the_texts_characters():
    model = build("hf:gpt2", (8,), 11, task="language_model", options=LM).eval()
    x = torch.randint(11, (2, 8))
    assert torch.equal(model(x), model.model(input_ids=x).logits)
    assert model(x).shape == (2, 8, 11)


def test_a_folder_gives_its_weights_if_it_is_asked(tmp_path):
    published = build("hf:vit", (1, 28, 28), 5, options=TINY)
    published.model.save_pretrained(tmp_path)
    for pretrained in (True, False):
        model = build(f"hf:{tmp_path}", (1, 28, 28), 5, options={"pretrained": pretrained})
        same = (
            torch.equal(a, b)
            for a, b in zip(model.parameters(), published.parameters(), strict=True)
            if a.dim() > 1
        )
        assert all(same) == pretrained
    assert json.loads((tmp_path / "config.json").read_text())["patch_size"] == 7


@pytest.mark.parametrize(
    ("name", "options", "task", "message"),
    [
        ("hf:vit", {"depth": 3}, "classification", "ViTConfig has no option 'depth'"),
        ("hf:gpt2", {}, "classification", "'hf:gpt2' cannot be made: .*AutoModelForImageClassification"),
        ("hf:vit", {}, "music", "is for classification or language_model, not for task music"),
        ("hf:./vitt", {}, "classification", "has no configuration"),
        ("timm:resnet18", {}, "language_model", "is for classification, not for task language_model"),
    ],
)  # fmt: skip
def test_refused(name, options, task, message):
    with pytest.raises(ConfigError, match=message):
        build(name, (3, 28, 28), 5, options=options, task=task)
