"""Write the table of which rule attaches to which model at which sites: docs/models.md. It needs the packages of `make clients`.

python tools/models_table.py              # all models, about ten minutes
python tools/models_table.py resnet18 GCN # print the rows of these alone
"""

from __future__ import annotations

import importlib
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import feedbackward as fb
from feedbackward.experiment import nets

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
sys.path.insert(0, str(ROOT / "tests" / "support"))

RULES = ("dkp", "dfa", "kp", "relayed_kp", "highway_kp", "dgl")
SITES = ("layers", "blocks")
# a size of images that the net takes, and its options
TIMM: dict[str, tuple[int, dict[str, Any]]] = {
    "resnet18": (32, {}), "resnet50": (32, {}), "densenet121": (32, {}), "inception_v3": (96, {}),
    "efficientnet_b0": (32, {}), "mobilenetv3_small_050": (32, {}), "regnety_002": (32, {}), "convnext_atto": (32, {}),
    "vit_tiny_patch16_224": (32, {"img_size": 32}), "swin_tiny_patch4_window7_224": (224, {}), "mixer_s32_224": (224, {}),
    "poolformer_s12": (32, {}),
}  # fmt: skip
OURS = ("mlp", "small_cnn", "vgg6", "resnet20")
GRAPHS = ("GCN", "GAT", "GraphSAGE", "GIN", "PNA", "EdgeCNN")
# a model, its example, and further options of attach
Made = tuple[nn.Module, Any, dict[str, Any]]


class Sequence(nn.Module):
    """Two LSTM layers, and a class for the whole sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.LSTM(8, 8, batch_first=True) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.one(x)
        h, _ = self.two(h)
        out: Tensor = self.head(h)
        return out


class Encoder(nn.Module):
    """PyTorch's own transformer encoder, and a class for every token."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.inner = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.inner(x))
        return out


def _images(side: int) -> Tensor:
    return torch.randn(4, 3, side, side)


def _ours(name: str) -> Made:
    return nets.build(name, (3, 32, 32), 10), _images(32), {}


def _timm(name: str) -> Made:
    side, options = TIMM[name]
    return importlib.import_module("timm").create_model(name, num_classes=5, **options), _images(side), {}  # fmt: skip


def _graph(name: str) -> Made:
    models = importlib.import_module("torch_geometric.nn.models")
    edges = torch.stack([torch.arange(30), (torch.arange(30) * 7 + 3) % 30])
    degrees = {"aggregators": ["mean"], "scalers": ["identity"], "deg": torch.tensor([0, 30])}
    net = getattr(models, name)(8, 16, 3, out_channels=4, **degrees if name == "PNA" else {})
    return net, (torch.randn(30, 8), edges), {}


def _transformers(name: str) -> Made:
    package = importlib.import_module("transformers")
    size: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}  # fmt: skip
    words = torch.randint(20, (4, 6))
    if name == "ViT":
        config = package.ViTConfig(image_size=16, patch_size=8, **size)
        return package.ViTForImageClassification(config), {"pixel_values": _images(16)}, {}
    if name == "BERT":
        config = package.BertConfig(vocab_size=20, **size)
        return package.BertForSequenceClassification(config), {"input_ids": words}, {}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = package.GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=8, **ends)  # fmt: skip
    # its head is tied to the embedding
    return package.GPT2LMHeadModel(config), {"input_ids": words}, {"error_at": "transformer.ln_f"}


def _unet(name: str) -> Made:
    net = importlib.import_module("monai.networks.nets").UNet
    model = net(spatial_dims=2, in_channels=3, out_channels=2, channels=(4, 8, 16), strides=(2, 2))
    return model, _images(16), {}


MODELS: dict[str, dict[str, Callable[[str], Made]]] = {
    "feedbackward": dict.fromkeys(OURS, _ours),
    "torch": {
        "nn.TransformerEncoder": lambda name: (Encoder(), torch.randn(4, 6, 8), {}),
        "nn.LSTM": lambda name: (Sequence(), torch.randn(4, 6, 8), {}),
    },
    "timm": dict.fromkeys(TIMM, _timm),
    "transformers": dict.fromkeys(("ViT", "BERT", "GPT-2"), _transformers),
    "torch_geometric": dict.fromkeys(GRAPHS, _graph),
    "monai": {"UNet": _unet},
}


def _outputs(out: Any) -> list[Tensor]:
    tensors = tree_leaves(dict(out) if isinstance(out, dict) else out)
    return [t for t in tensors if isinstance(t, Tensor) and t.requires_grad]


def _labels(out: Tensor) -> tuple[int, ...]:
    """The shape of labels for these outputs: images have their classes first, all others last."""
    return (len(out), *out.shape[2:]) if out.dim() == 4 else tuple(out.shape[:-1])


def tried(make: Callable[[str], Made], name: str, rule: str, sites: str) -> int | str:
    """How many sites the rule attaches to and trains with, or why it does not."""
    torch.manual_seed(0)
    model, example, options = make(name)
    given = example if isinstance(example, tuple) else (example,) if isinstance(example, Tensor) else ()  # fmt: skip
    named = example if isinstance(example, dict) else {}
    try:
        learner = fb.attach(model, rule, example=example, sites=sites, **options)
        if learner.attached.needs_target:
            learner.target(
                torch.zeros(_labels(_outputs(model(*given, **named))[0]), dtype=torch.int64)
            )
        sum(t.square().mean() for t in _outputs(learner(*given, **named))).backward()
    except fb.FeedbackError as error:
        return str(error)
    if learner.plan.unreached:
        raise AssertionError(f"{name} {rule} {sites}: nothing trains {learner.plan.unreached[:3]}")
    return len(learner.sites)


def rows(only: tuple[str, ...] = ()) -> tuple[list[str], list[str]]:
    """The lines of the table, and those of the table of reasons."""
    lines, reasons = [], []
    for package, models in MODELS.items():
        for name, make in models.items():
            if only and name not in only:
                continue
            found = {(s, r): tried(make, name, r, s) for s in SITES for r in RULES}
            counts = []
            for s in SITES:
                numbers = sorted(
                    {n for (where, _), n in found.items() if where == s and isinstance(n, int)}
                )
                counts.append(f"{numbers[-1]}" if numbers else "-")
            marks = [
                ", ".join(s for s in SITES if isinstance(found[s, r], int)) or "no" for r in RULES
            ]
            lines.append(f"| {package} | {name} | {' | '.join([*counts, *marks])} |")
            for s in SITES:
                why: dict[str, list[str]] = {}
                for r in RULES:
                    # a chain runs from layer to layer: its legend says so
                    if (
                        isinstance(text := found[s, r], str)
                        and "a chain runs from layer to layer" not in text
                    ):
                        why.setdefault(_first(text), []).append(f"`{r}`")
                reasons += [
                    f"| {name} | {s} | {', '.join(who)} | {text} |" for text, who in why.items()
                ]
            print(lines[-1], file=sys.stderr, flush=True)
    return lines, reasons


def _first(text: str) -> str:
    """The first sentence of a message, within a cell."""
    sentence = text.split(". ")[0].rstrip(".").replace("|", "\\|").replace("\n", " ")
    return textwrap.shorten(sentence, 200, placeholder=" ...")


HEAD = """# Models and rules

This page is for readers who ask whether a rule works with their network. `python tools/models_table.py` made it: each
rule was attached to each model at `sites="layers"` and at `sites="blocks"`, and took one backward pass, after which no parameter
was left without a segment that trains it. The models are small forms of what their packages make, with random weights.

- **layers**, **blocks**: the most sites that one of these rules has there. A chain (`kp`, `highway_kp`) feeds every layer but
  the first.
- Columns of rules: the sites at which it attaches. `kp`, `relayed_kp` and `highway_kp` run from layer to layer, so `blocks`
  is not for them.
- For GPT-2, whose head is tied to its embedding, the error is taken below the head: `error_at="transformer.ln_f"`.
- A model of another package needs no entry here: `fb.attach` looks at the pass and not at classes, and what it cannot serve is
  an error that says why. Sites can be named, too: `sites=["layer1", "layer2"]`.

"""


def main() -> int:
    warnings.simplefilter("ignore")
    import client_nets  # noqa: F401 (lets torchvision be imported)

    only = tuple(sys.argv[1:])
    lines, reasons = rows(only)
    table = [
        f"| Package | Model | layers | blocks | {' | '.join(f'`{r}`' for r in RULES)} |",
        "|" + "---|" * (4 + len(RULES)),
        *lines,
    ]
    why = ["| Model | Sites | Rules | Reason |", "|---|---|---|---|", *reasons]
    text = "\n".join(
        [
            *table,
            "",
            "## Where a rule is refused",
            "The first sentence of the message, which also says what to do instead.",
            "",
            *why,
            "",
        ]
    )
    if only:
        print(text)
        return 0
    PAGE.write_text(HEAD + text)
    print(f"written: {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
