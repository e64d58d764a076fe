"""How well the best linear estimate tells backprop's signal: from the error `e` alone, and from `e` times features `phi`.

    python bench/richer_source.py [--epochs 3]

vgg6 is trained by backprop on the embedded images. For every site a ridge regression from `e`, or from all products of `e` with
`[1, phi]`, to backprop's signal is fitted on three quarters of the images, and judged by its cosine to the signals of the rest.
A direct rule whose feedback is linear in its source cannot do better. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feedbackward.experiment import nets
from feedbackward.experiment.data import DataConfig, load_data

RIDGES = (1e-3, 1e-2, 1e-1)


def trained(x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    """vgg6 after so many epochs by the recipe of the embedded images."""
    net = nets.build("vgg6", tuple(x.shape[1:]), 10)
    steps = epochs * (len(x) // 100)
    optimizer = torch.optim.SGD(net.parameters(), 0.025, 0.9, nesterov=True, weight_decay=5e-4)
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.025, total_steps=steps, cycle_momentum=False
    )
    for _ in range(epochs):
        for index in torch.randperm(len(x))[: len(x) // 100 * 100].split(100):
            optimizer.zero_grad()
            F.cross_entropy(net(x[index]), y[index]).backward()
            optimizer.step()
            rate.step()
    return net.eval()


def signals(net: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The errors [N, C], backprop's signals at every ReLU, and the activity of the last one."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            output.retain_grad()
            found[name] = output

        return hook

    names = [name for name, m in net.named_modules() if isinstance(m, nn.ReLU)]
    for name in names:
        net.get_submodule(name).register_forward_hook(keep(name))
    errors, grads, last = [], {name: [] for name in names}, []
    for index in torch.arange(len(x)).split(250):
        scores = net(x[index])
        F.cross_entropy(scores, y[index], reduction="sum").backward()
        errors.append(scores.detach().softmax(1) - F.one_hot(y[index], 10))
        for name in names:
            grads[name].append(found[name].grad)
        last.append(found[names[-1]].detach())
    joined = {name: torch.cat(parts) for name, parts in grads.items()}
    return torch.cat(errors), joined, torch.cat(last)


def directions(h: Tensor, count: int) -> Tensor:
    """The first principal components of features [N, n], each with variance one."""
    h = h - h.mean(0)
    z = h @ torch.linalg.svd(h, full_matrices=False).Vh[:count].T
    return z / z.std(0)


def cosine(features: Tensor, signal: Tensor) -> float:
    """Of the best of the ridge regressions to the signals of images that it was not fitted on."""
    cut = len(features) * 3 // 4
    a, b = features.double(), signal.flatten(1).double()
    gram, right = a[:cut].T @ a[:cut], a[:cut].T @ b[:cut]
    eye = torch.eye(len(gram), dtype=gram.dtype) * gram.diagonal().mean()
    found = []
    for ridge in RIDGES:
        estimate = a[cut:] @ torch.linalg.solve(gram + ridge * eye, right)
        found.append(F.cosine_similarity(estimate.flatten(), b[cut:].flatten(), 0).item())
    return max(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=3)
    torch.manual_seed(0)
    data = load_data(DataConfig(name="fashion-mini"))
    x = (data.train.images.float() / 255 - data.mean[0]) / data.std[0]
    y = data.train.labels.long()
    net = trained(x, y, parser.parse_args().epochs)
    e, grads, last = signals(net, x, y)
    ones = torch.ones(len(x), 1)
    sources = {"e": e}
    for count in (8, 16):
        phi = torch.cat([ones, directions(last, count)], 1)
        sources[f"e and e times {count} features"] = torch.einsum("nc,nk->nck", e, phi).flatten(1)
    print("| site |", " | ".join(sources), "|\n|---|" + "---:|" * len(sources))
    for name in list(grads)[:-1]:
        row = (f"{cosine(source, grads[name]):.2f}" for source in sources.values())
        print(f"| {name} |", " | ".join(row), "|", flush=True)


if __name__ == "__main__":
    main()
