"""What the tests of clients share: which packages they need, and tiny nets of transformers with their data."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

# of an encoder, without randomness
SMALL: Any = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
ASKED = bool(os.environ.get("CLIENTS"))


def needed(package: str, slow: bool = True) -> Any:
    """The package. The tests of a file are skipped where it is missing, and slow ones where nobody asked for them."""
    if slow and not ASKED:
        pytest.skip("slow: `make clients` runs it", allow_module_level=True)
    return pytest.importorskip(package, reason=f"needs {package}: see the extra `clients`")


def vit(rows: int = 16) -> tuple[nn.Module, list[dict[str, Any]]]:
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(**SMALL, image_size=16, patch_size=8, num_labels=4)
    images = torch.randn(rows, 3, 16, 16, dtype=torch.float64)
    data = [{"pixel_values": image, "labels": i % 4} for i, image in enumerate(images)]
    return transformers.ViTForImageClassification(config).double(), data


def bert(rows: int = 16) -> tuple[nn.Module, list[dict[str, Any]]]:
    """With some rows padded."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        **SMALL, vocab_size=11, max_position_embeddings=8, num_labels=4
    )
    ids = torch.randint(11, (rows, 6))
    data = [
        {"input_ids": row, "attention_mask": (torch.arange(6) < 4 + i % 3).long(), "labels": i % 4}
        for i, row in enumerate(ids)
    ]
    return transformers.BertForSequenceClassification(config).double(), data


def gpt2(rows: int = 16) -> tuple[nn.Module, list[dict[str, Any]]]:
    """With an embedding that is tied to the head."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=16, n_layer=3, n_head=2, vocab_size=11, n_positions=8,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    ids = torch.randint(11, (rows, 6))
    model = transformers.GPT2LMHeadModel(config).double()
    return model, [{"input_ids": row, "labels": row} for row in ids]


def batch(data: list[dict[str, Any]], labels: bool = True) -> dict[str, torch.Tensor]:
    keys = [key for key in data[0] if labels or key != "labels"]
    return {key: torch.stack([torch.as_tensor(row[key]) for row in data]) for key in keys}


def arguments(folder: Path, **changes: Any) -> Any:
    """Plain SGD in float64, one batch after the other in the order of the data."""
    import transformers

    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4, "num_train_epochs": 1, "report_to": [], "use_cpu": True,
        "save_steps": 2, "disable_tqdm": True, "max_grad_norm": 0.0, "lr_scheduler_type": "constant",
        "optim": "sgd", "learning_rate": 0.1, "logging_strategy": "no",
        "train_sampling_strategy": "sequential", **changes,
    }  # fmt: skip
    return transformers.TrainingArguments(str(folder), **settings)


def torchvision_here() -> None:
    """Skip the tests of a file where there is no torchvision."""
    needed("torch")
    if "torchvision" not in sys.modules:
        pytest.skip("needs torchvision: see the extra `clients`", allow_module_level=True)


def _import_torchvision() -> None:
    """Beside a PyTorch without CUDA its wheel of PyPI misses two operators, which nets do not use.

    Before any package imports it, in every process: torchmetrics, timm and transformers do where it is installed.
    """
    try:
        import torchvision
    except ImportError:
        return
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for operator in ("nms", "qnms"):
            signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{operator}", signature)
        import torchvision  # noqa: F401


if ASKED:
    _import_torchvision()
