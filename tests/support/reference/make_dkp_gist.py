"""Write dkp_gist.json: gradients that the DKP authors' hooks give the weights W and the feedback B of their own CIFAR-10 net.

cd tests && python -m reference.make_dkp_gist PATH   # a checkout of github.com/webstah/dkp-gist (15eeb15 was used)

The tests compare ours with them. Weights, feedback and images are given by formulas. Of every gradient the file holds some
entries, evenly spread, and the sum of all, each times a fixed number, which no wrong entry leaves as it is.
"""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .make_biotorch import numbers

FILE = Path(__file__).with_name("dkp_gist.json")
MODES = ("DFA", "DKP")
BATCH, CLASSES = 5, 10
SITES = ("block1.relu", "block2.relu", "block3.relu")  # our names for where their hooks are
THEIRS = {  # their names for our parameters; their convolutions' biases are at zero here, and norms take them out
    "block1.conv.weight": "conv1.weight", "block1.norm.weight": "conv1_bn.weight", "block1.norm.bias": "conv1_bn.bias",
    "block2.conv.weight": "conv2.weight", "block2.norm.weight": "conv2_bn.weight", "block2.norm.bias": "conv2_bn.bias",
    "block3.fc.weight": "fc1.weight", "block3.fc.bias": "fc1.bias", "head.weight": "fc2.weight", "head.bias": "fc2.bias",
}  # fmt: skip


def batch() -> tuple[Tensor, Tensor]:
    return numbers((BATCH, 3, 32, 32), 77), torch.arange(BATCH) * 3 % CLASSES


def fill(parameters: list[Tensor]) -> None:
    """Weights as large as the usual initial ones; scales and biases that matter."""
    for i, p in enumerate(parameters):
        fan = p[0].numel() if p.dim() > 1 else 4
        p.data = numbers(tuple(p.shape), i, fan**-0.5) + (1.0 if p.dim() == 1 else 0.0)


def feedback(i: int, shape: tuple[int, ...]) -> Tensor:
    """`B` of site i, `[C, *site]`."""
    return numbers(shape, 100 + i, 0.1)


def digest(gradient: Tensor) -> list[float]:
    """About 40 entries, and the weighted sum of all."""
    flat = gradient.detach().double().flatten()
    some = flat[:: max(1, len(flat) // 40)]
    return [
        float(f"{v:.12e}") for v in [*some.tolist(), (flat @ numbers(tuple(flat.shape), 5)).item()]
    ]


@contextlib.contextmanager
def _in_double() -> Iterator[None]:
    """In float64, on the CPU: they make feedback in the first pass, on the current CUDA device."""
    torch.set_default_dtype(torch.float64)
    try:
        with (
            mock.patch.object(torch.cuda, "current_device", return_value="cpu"),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # deprecated parts of PyTorch
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def gradients(net: nn.Module, hooks: list[nn.Module]) -> dict[str, Tensor]:
    x, y = batch()
    net(x, y)  # makes the feedback
    own = dict(net.named_parameters())
    fill([own[name] for name in THEIRS.values()])
    for name in ("conv1.bias", "conv2.bias"):
        own[name].data.zero_()
    for i, hook in enumerate(hooks):
        hook.backward_weights.data = feedback(i, tuple(hook.backward_weights.shape))  # type: ignore[union-attr,arg-type]
    F.cross_entropy(net(x, y), y).backward()
    found = {ours: own[name].grad for ours, name in THEIRS.items()}
    found |= {site: hook.backward_weights.grad for site, hook in zip(SITES, hooks, strict=True)}
    return {name: g for name, g in found.items() if g is not None}


def main(path: str) -> None:
    sys.path.insert(0, path)
    from networks.conv import ConvNetwork

    made: dict[str, dict[str, list[float]]] = {}
    for mode in MODES:
        with _in_double():
            net = ConvNetwork(BATCH, mode, "cpu").train()
            found = gradients(net, [net.conv1_dfa, net.conv2_dfa, net.fc1_dfa])
        made[mode] = {name: digest(gradient) for name, gradient in found.items()}
    FILE.write_text(json.dumps(made, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
