"""Time and peak memory of `attach` on nets of the size of ResNet-18 and of GPT-2 small, beside those of a training pass.

    python bench/attach.py > bench/results/attach.md

Each measurement runs in a process of its own, on one thread. Time is the process's own, so that other processes on the
machine do not count. Peak memory is the resident memory at its highest, less that before; that of `attach` holds the
example's activities and the feedback weights, that of a training pass the activities and the gradients. The bar: 2 seconds,
and, without the feedback weights, twice the model's own memory.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import feedbackward as fb

MB = 1e6


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, and a skip path."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.relu1, self.relu2, self.skip = nn.ReLU(), nn.ReLU(), nn.Identity()
        if stride > 1:
            skip = nn.Conv2d(before, width, 1, stride, bias=False)
            self.skip = nn.Sequential(skip, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu1(self.norm1(self.conv1(x)))
        return self.relu2(self.norm2(self.conv2(h)) + self.skip(x))


def resnet18() -> tuple[nn.Module, Tensor]:
    """11.7 million parameters; two images of 224 x 224."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    before = 64
    for width in (64, 128, 256, 512):
        layers += [BasicBlock(before, width, 1 + (width > before)), BasicBlock(width, width, 1)]
        before = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000)]
    return nn.Sequential(*layers), torch.randn(2, 3, 224, 224)


class TransformerBlock(nn.Module):
    """Causal attention and a layer of width 4 x 768, each after a norm and beside a skip path."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.act, self.down = (
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(self.act(self.up(self.norm2(x))))


class Gpt2(nn.Module):
    """124 million parameters, the table of tokens tied to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(50257, 768), nn.Embedding(1024, 768)
        self.blocks = nn.ModuleList(TransformerBlock(768, 12) for _ in range(12))
        self.norm, self.head = nn.LayerNorm(768), nn.Linear(768, 50257, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.places(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


def gpt2() -> tuple[nn.Module, Tensor]:
    """Two texts of 32 tokens."""
    return Gpt2(), torch.randint(50257, (2, 32))


SMALL = fb.PerShape(maps=fb.Pooled(), vectors=fb.Dense())
CASES = {
    "ResNet-18, DFA (pooled feedback), layers": (resnet18, fb.DFA(operator=SMALL), {}),
    "ResNet-18, DFA (pooled feedback), blocks": (
        resnet18,
        fb.DFA(operator=SMALL),
        {"sites": "blocks"},
    ),
    "ResNet-18, FA": (resnet18, fb.FA(), {}),
    "GPT-2 small, DFA of the last norm, blocks": (
        gpt2,
        fb.DFA(),
        {"sites": "blocks", "error_at": "norm"},
    ),
    "GPT-2 small, DFA of the last norm, layers": (gpt2, fb.DFA(), {"error_at": "norm"}),
}


def resident(kind: str) -> float:
    """Of this process, in MB: VmRSS is what is held now, VmHWM the most there was."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{kind}:\s+(\d+) kB", text).group(1)) * 1024 / MB


def measure(name: str) -> str:
    """A row of the table."""
    torch.set_num_threads(1)
    make, rule, options = CASES[name]
    torch.manual_seed(0)
    model, x = make()
    own = sum(p.nbytes for p in model.parameters()) / MB
    # kernels are chosen, and what PyTorch imports late is there
    small = x[:, :, :32, :32] if x.dim() == 4 else x[:, :4]
    model(small).sum().backward()
    model.zero_grad()
    # in this order: memory that a training pass has freed would not count again
    seconds, peak, learner = cost(lambda: fb.attach(model, rule, example=x, **options))
    feedback = learner.feedback_bytes / MB
    met = "yes" if seconds < 2 and peak - feedback < 2 * own else "no"
    learner.detach()
    pass_seconds, pass_peak, _ = cost(lambda: model(x).square().mean().backward())
    return (
        f"| {name} | {len(learner.sites)} | {pass_seconds:.2f} | {seconds:.2f} | {own:.0f} | {pass_peak:.0f} | {peak:.0f} | "
        f"{feedback:.0f} | {met} |"
    )


def cost(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds of the process, and MB at the highest above those before."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    start = time.process_time()
    result = work()
    return time.process_time() - start, resident("VmHWM") - before, result


def processor() -> str:
    """The name that the processor gives itself."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found.group(1) if found else platform.machine()


def main() -> None:
    """Print the table, each row the one of median time of several runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--case", choices=CASES)
    arguments = parser.parse_args()
    if arguments.case:
        print(measure(arguments.case))
        return
    print("# What `attach` costs\n")
    print(
        f"`python bench/attach.py`, median of {arguments.runs} runs, one thread of {processor()}, torch "
        f"{torch.__version__}, feedbackward {fb.__version__}; seconds of the process. ResNet-18 on two images of 224 x 224, GPT-2 on "
        "two texts of 32 tokens.\n"
    )
    columns = (
        "sites",
        "training pass, s",
        "attach, s",
        "model, MB",
        "training pass, MB",
        "attach, MB",
        "feedback, MB",
    )
    print(f"| case | {' | '.join(columns)} | bar met |")
    print(f"|---|{'--:|' * len(columns)}---|")
    for name in CASES:
        command = [sys.executable, "-W", "ignore", __file__, "--case", name]
        rows = [
            subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
            for _ in range(arguments.runs)
        ]
        print(sorted(rows, key=lambda row: float(row.split("|")[4]))[len(rows) // 2], flush=True)


if __name__ == "__main__":
    main()
