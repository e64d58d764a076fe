"""Write biotorch.json: gradients that BioTorch computes by FA, uSF and frSF on two small networks with fixed numbers.

python tests/reference/make_biotorch.py PATH   # a checkout of github.com/jsalbert/biotorch (74fad0d was used)

The tests compare ours with them. The networks and all their numbers are given by formulas, so that nothing depends on a
random generator.
"""

from __future__ import annotations

import json
import sys
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FILE = Path(__file__).with_name("biotorch.json")
MODES = ("fa", "usf", "frsf")


def numbers(shape: tuple[int, ...], start: int, scale: float = 1.0) -> Tensor:
    """A fixed sequence in [-scale, scale] that repeats nothing."""
    index = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (scale * torch.sin(1.7 * index * (1 + 0.01 * index) + start)).view(shape)


def nets() -> dict[str, tuple[nn.Sequential, Tensor, Tensor]]:
    """Each network with its inputs and labels, in float64; weights as large as the usual initial ones."""
    mlp = nn.Sequential(
        OrderedDict(
            fc1=nn.Linear(6, 8), act1=nn.ReLU(), fc2=nn.Linear(8, 7), act2=nn.Tanh(), fc3=nn.Linear(7, 5), act3=nn.ReLU(),
            head=nn.Linear(5, 4),
        )
    )  # fmt: skip
    conv = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(2, 4, 3, padding=1), bn1=nn.BatchNorm2d(4), act1=nn.ReLU(), pool=nn.MaxPool2d(2),
            conv2=nn.Conv2d(4, 6, 3, stride=2, padding=1), bn2=nn.BatchNorm2d(6), act2=nn.ReLU(),
            conv3=nn.Conv2d(6, 4, 3, padding=2, dilation=2, groups=2), act3=nn.Tanh(),
            flat=nn.Flatten(), fc=nn.Linear(16, 6), act4=nn.ReLU(), head=nn.Linear(6, 3),
        )
    )  # fmt: skip
    made = {"mlp": (mlp, (5, 6), 4), "conv": (conv, (4, 2, 8, 8), 3)}
    for net, _, _ in made.values():
        net.double()
        for i, p in enumerate(net.parameters()):
            fan = p[0].numel() if p.dim() > 1 else 4
            p.data = numbers(tuple(p.shape), i, fan**-0.5) + (1.0 if p.dim() == 1 else 0.0)
    return {
        name: (net, numbers(shape, 77), torch.arange(shape[0]) % classes)
        for name, (net, shape, classes) in made.items()
    }


def feedback(net: nn.Sequential) -> dict[str, Tensor]:
    """The fixed `B` of every layer (its absolute values for frSF)."""
    layers = [(n, m) for n, m in net.named_children() if isinstance(m, (nn.Linear, nn.Conv2d))]
    return {
        name: numbers(tuple(m.weight.shape), 100 + i, m.weight[0].numel() ** -0.5)
        for i, (name, m) in enumerate(layers)
    }


def main(path: str) -> None:
    sys.path.insert(0, path)
    from biotorch.module.biomodule import BioModule

    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for name in nets():
        for mode in MODES:
            net, x, y = nets()[name]
            fixed = feedback(net)
            model = BioModule(net, mode=mode).double().module
            for layer, B in fixed.items():
                if mode != "usf":
                    held = model.get_submodule(layer).weight_backward
                    held.data = B.abs() if mode == "frsf" else B
            F.cross_entropy(model(x), y).backward()
            found.setdefault(name, {})[mode] = {
                key: [round(v, 9) for v in p.grad.flatten().tolist()]
                for key, p in model.named_parameters()
                if p.grad is not None
            }
    FILE.write_text(json.dumps(found, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
