"""A zoo of small nasty models: every way of wiring layers that once broke a cut.

Each `Case` says how to build the model, what it is fed, and what theory says about its plan: the names of its sites
in forward order (None: not stated) and whether parameters lie in several segments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import zoo_blocks as blocks
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Case:
    """N = 5 samples everywhere; no other dimension has that size.

    overlap: whether some parameters belong to several segments.
    silent: parameters whose true gradient is zero in theory (a bias before batch norm).
    """

    name: str
    build: Callable[[], nn.Module]
    example: Callable[[], Any]
    sites: tuple[str, ...] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    overlap: bool = False
    silent: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name


class Plain(nn.Module):
    """Modules in a row with functional activations, pooling and flattening between them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.fc1, self.fc2 = (
            nn.Conv2d(4, 6, 3, padding=1),
            nn.Linear(24, 7),
            nn.Linear(7, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn(self.conv1(x))), 2)
        x = F.avg_pool2d(torch.tanh(self.conv2(x)), 2)
        return self.fc2(F.dropout(F.gelu(self.fc1(torch.flatten(x, 1))), 0.2, self.training))


class Twice(nn.Module):
    """One layer used at two depths, a shared activation module, and a tied output weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.act = nn.Linear(6, 6), nn.Linear(6, 6), nn.Tanh()
        self.last = nn.Linear(6, 6)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        x = self.act(self.shared(x))
        x = self.act(self.shared(x))
        return self.last(x)


class Inputs(nn.Module):
    """Two inputs with a branch each, joined by concatenation; by position or by name."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Conv1d(2, 3, 3, padding=1), nn.Embedding(11, 4)
        self.left, self.right, self.out = nn.Linear(18, 7), nn.Linear(4, 7), nn.Linear(14, 3)

    def forward(self, image: Tensor, words: Tensor, scale: float = 1.0) -> Tensor:
        a = torch.relu(self.left(torch.relu(self.image(image)).flatten(1)))
        b = torch.relu(self.right(self.text(words).mean(1)))
        return self.out(torch.cat([a, scale * b], 1))


class Outputs(nn.Module):
    """Returns logits and a hidden activity, as tuple or dict."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.body, self.head = (
            form,
            nn.Sequential(nn.Linear(6, 7), nn.ReLU()),
            nn.Linear(7, 3),
        )

    def forward(self, x: Tensor) -> Any:
        hidden = self.body(x)
        logits = self.head(hidden)
        return (hidden, logits) if self.form == "tuple" else {"hidden": hidden, "logits": logits}


class Halves(nn.Module):
    """A module that returns two tensors, each of which enters a layer of its own."""

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            a, b = torch.relu(self.layer(x)).chunk(2, -1)
            return a.contiguous(), b.contiguous()

    def __init__(self) -> None:
        super().__init__()
        self.split, self.left, self.right = self.Split(), nn.Linear(4, 7), nn.Linear(4, 7)
        self.out = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.split(x)
        return self.out(torch.relu(self.left(a) + self.right(b)))


class Recurrent(nn.Module):
    """Embedding, LSTM over the tokens, a layer per token, and a class from the last token."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.up = nn.Embedding(11, 6), nn.Linear(6, 7)
        self.lstm, self.fc, self.out = (
            nn.LSTM(7, 6, batch_first=True),
            nn.Linear(6, 8),
            nn.Linear(8, 3),
        )

    def forward(self, words: Tensor) -> Tensor:
        hidden, _ = self.lstm(torch.relu(self.up(self.words(words))))
        return self.out(torch.relu(self.fc(hidden)).mean(1))


class Autoencoder(nn.Module):
    """Strided convolutions down, transposed ones up: the output is an image."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(2, 3, 3, 2, 1), nn.Conv2d(3, 4, 3, 2, 1)
        self.up1, self.up2 = nn.ConvTranspose2d(4, 3, 2, 2), nn.ConvTranspose2d(3, 2, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up2(F.elu(self.up1(F.elu(self.down2(F.elu(self.down1(x)))))))


class Volume(nn.Module):
    """Three-dimensional convolution, instance norm, adaptive pooling, and an output of shape [N]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = (
            nn.Conv3d(1, 3, 3, padding=1, bias=False),
            nn.InstanceNorm3d(3, affine=True),
        )
        self.conv2, self.fc = nn.Conv3d(3, 4, 2), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.norm(self.conv1(x)))))
        return self.fc(F.adaptive_avg_pool3d(x, 1).flatten(1)).squeeze(-1)


def mlp() -> nn.Module:
    hidden = [nn.Linear(8, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Dropout(0.2)]
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), *hidden, nn.Linear(7, 3))


def signal_1d() -> nn.Module:
    convs = [
        nn.Conv1d(2, 4, 3, dilation=2),
        nn.ReLU(),
        nn.Conv1d(4, 4, 3, stride=2, groups=2),
        nn.GELU(),
    ]
    return nn.Sequential(*convs, nn.Conv1d(4, 6, 1), nn.Flatten(), nn.SiLU(), nn.Linear(24, 3))


def group_norms() -> nn.Module:
    first = [nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2)]
    second = [
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
    ]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(4, 3))


def convolutions() -> nn.Module:
    """Grouped, dilated, strided and transposed convolutions in a row."""
    down = [
        nn.Conv2d(2, 4, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, padding=2, dilation=2),
        nn.ReLU(),
    ]
    up = [
        nn.Conv2d(6, 4, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 2, 2, stride=2),
        nn.ReLU(),
    ]
    return nn.Sequential(*down, *up, nn.Flatten(), nn.Linear(128, 3))


def tokens() -> nn.Module:
    """A Linear on `[N, T, D]` throughout: the source keeps its tokens too."""
    return nn.Sequential(
        nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 7), nn.GELU(), nn.Linear(7, 3)
    )


def in_place() -> nn.Module:
    """Activations that overwrite their input: the producers of the sites."""
    conv = [
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
    ]
    return nn.Sequential(
        *conv,
        nn.Conv2d(4, 6, 3),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(24, 7),
        nn.ReLU6(True),
        nn.Linear(7, 3),
    )


def parametrized() -> nn.Module:
    """Spectral norm and weight norm: parameters that are computed from others, with buffers that move."""
    norms = nn.utils.parametrizations
    second = norms.weight_norm(nn.Linear(8, 7))
    return nn.Sequential(
        norms.spectral_norm(nn.Linear(6, 8)),
        nn.ReLU(),
        second,
        nn.ReLU(),
        nn.Identity(),
        nn.Linear(7, 3),
    )


def image(channels: int = 2, size: int = 8) -> Callable[[], Tensor]:
    return lambda: torch.randn(5, channels, size, size)


def rows(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(5, *shape)


def words(count: int = 7) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, 11, (5, count))


def logits(out: Any) -> Tensor:
    return out["logits"] if isinstance(out, dict) else out[1]


def two_inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 2, 6), torch.randint(0, 11, (5, 7))


def named_inputs() -> dict[str, Any]:
    image, words = two_inputs()
    return {"words": words, "image": image, "scale": 0.5}


BRANCHES = ("left.input", "right.input", "out.input")
ZOO = (
    Case("mlp", mlp, rows(6), ("1", "5"), silent=("2.bias",)),
    Case(
        "plain", Plain, image(), ("conv2.input", "fc1.input", "fc2.input"), silent=("conv1.bias",)
    ),
    Case("signal_1d", signal_1d, rows(2, 14), ("1", "3", "6")),
    Case("group_norms", group_norms, image(), ("3", "8")),
    Case("convolutions", convolutions, image(), ("1", "3", "5", "8")),
    Case("volume", Volume, rows(1, 4, 4, 4), ("conv2.input", "fc.input")),
    Case("autoencoder", Autoencoder, image(), ("down2.input", "up1.input", "up2.input")),
    Case("tokens", tokens, rows(4, 6), ("2", "4")),
    Case("in_place", in_place, image(), ("3", "6", "8"), silent=("0.bias",)),
    Case("parametrized", parametrized, rows(6), ("1", "3")),
    Case("twice", Twice, rows(6), ("shared.input", "shared.input#1", "last.input"), overlap=True),
    Case("two_inputs", Inputs, two_inputs, BRANCHES),
    Case("named_inputs", Inputs, named_inputs, BRANCHES),
    Case("tuple_output", lambda: Outputs("tuple"), rows(6), ("body.1",), {"output": logits}),
    Case("dict_output", lambda: Outputs("dict"), rows(6), ("body.1",), {"output": logits}),
    Case("error_at", mlp, rows(6), ("1",), {"error_at": "2"}, silent=("2.bias",)),
    Case("halves", Halves, rows(6), ("split", "split[1]", "out.input"), overlap=True),
    Case("recurrent", Recurrent, words(), ("lstm", "out.input")),
    Case(
        "attention",
        blocks.Attention,
        rows(4, 6),
        ("norm", "mixed", "out.input"),
        silent=("k.bias",),
    ),
    Case("resnet", blocks.resnet, image(), None, silent=("stem.0.bias",)),
    Case("resnet_functional", blocks.FunctionalResNet, image(), None, overlap=True),
    Case("resnet_preactivation", blocks.preactivation_resnet, image(), None, overlap=True),
    Case("densenet", blocks.densenet, image(), None, overlap=True),
    Case("mobilenet", blocks.mobilenet, image(), None),
    Case("inception", blocks.inception, image(), ("1", "3")),
    Case("vit", blocks.ViT, image(), None, overlap=True),
    Case("vit_blocks", blocks.ViT, image(), ("blocks.0", "blocks.1"), {"sites": "blocks"}),
    Case("gpt_blocks", blocks.GPT, words(), ("h.0", "h.1"), {"sites": "blocks"}, overlap=True),
    Case(
        "resnet_blocks", blocks.resnet, image(), None, {"sites": "blocks"}, silent=("stem.0.bias",)
    ),
    Case("named", Plain, image(), ("conv1", "fc1"), {"sites": ["fc1", "conv1"]}),
    Case(
        "predicate",
        mlp,
        rows(6),
        ("0", "2"),
        {"sites": lambda name, module: isinstance(module, nn.Linear)},
    ),
)


def case(name: str) -> Case:
    return next(c for c in ZOO if c.name == name)


def build(case: Case, seed: int = 0) -> tuple[nn.Module, Any]:
    """A fresh model and example of the case, the same for the same seed."""
    torch.manual_seed(seed)
    return case.build(), case.example()


def run(model: nn.Module, example: Any) -> Any:
    if isinstance(example, Tensor):
        return model(example)
    return model(**example) if isinstance(example, dict) else model(*example)


def loss_of(case: Case, out: Any) -> Tensor:
    """A loss of the output with a generic gradient: every unit and every sample has its own."""
    out = case.options["output"](out) if "output" in case.options else out
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
    return (out * weight.cos()).sum() + out.square().mean()
