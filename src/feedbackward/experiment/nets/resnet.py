"""Residual nets: the CIFAR form (ResNet-20, -56, -110) and ResNet-18."""

from collections import OrderedDict

import torch
from torch import nn

from feedbackward.experiment.nets.blocks import Shape, conv_block, kaiming_convs


class PadShortcut(nn.Module):
    """Option A of He et al. 2016: every second pixel, new channels zero; no parameters.

    [N, c, H, W] -> [N, c + extra, ceil(H / 2), ceil(W / 2)].
    """

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.extra))


def _project(widths: tuple[int, int], norm: bool) -> nn.Sequential:
    """Option B of He et al. 2016: a 1x1 convolution of stride 2 (and norm)."""
    conv = nn.Conv2d(*widths, kernel_size=1, stride=2, bias=not norm)
    layers: OrderedDict[str, nn.Module] = OrderedDict(conv=conv)
    if norm:
        layers["norm"] = nn.BatchNorm2d(widths[1])
    return nn.Sequential(layers)


class BasicBlock(nn.Module):
    """relu2(f(x) + shortcut(x)), f = two 3x3 convolutions: [N, c, H, W] -> [N, c', H / stride, W / stride].

    A block that keeps its shape has no `shortcut` module at all: an `nn.Identity` would return the previous
    block's own tensor, and a cut at that name would then leave the path through f whole.
    """

    def __init__(self, widths: tuple[int, int], norm: bool, project: bool) -> None:
        super().__init__()
        c_in, c_out = widths
        self.conv1 = nn.Conv2d(c_in, c_out, 3, 1 if c_in == c_out else 2, 1, bias=not norm)
        self.norm1 = nn.BatchNorm2d(c_out) if norm else None
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=not norm)
        self.norm2 = nn.BatchNorm2d(c_out) if norm else None
        self.shortcut: nn.Module | None = None
        if c_in != c_out:
            self.shortcut = _project(widths, norm) if project else PadShortcut(c_out - c_in)
        self.relu2 = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(x)
        h = self.relu1(h if self.norm1 is None else self.norm1(h))
        h = self.conv2(h)
        h = h if self.norm2 is None else self.norm2(h)
        return self.relu2(h + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nn.Module):
    """A stem, stages of `BasicBlock`, a global average and a linear layer: [N, *in_shape] -> [N, classes].

    `widths` are the channels of the stages, `depth` the blocks in each; every stage after the first halves
    the map. `project=False` is the CIFAR form with option A shortcuts (6 * depth + 2 layers), `project=True`
    the ImageNet form with option B. The stem is 3x3 with stride 1, or for the ImageNet form above 64 px 7x7
    with stride 2 and a max-pool. He initialisation of convolutions. Without norm the activity's variance
    would double with every block: each block's second convolution is then divided by sqrt(number of blocks).
    """

    def __init__(
        self,
        in_shape: Shape,
        classes: int,
        norm: bool = True,
        *,
        widths: tuple[int, ...],
        depth: int,
        project: bool,
    ) -> None:
        super().__init__()
        stem_widths = (in_shape[0], widths[0])
        if project and max(in_shape[1:]) > 64:
            pool = {"pool": nn.MaxPool2d(3, 2, 1)}
            self.stem = conv_block(stem_widths, norm, pool, kernel_size=7, stride=2, padding=3)
        else:
            self.stem = conv_block(stem_widths, norm, kernel_size=3, padding=1)
        before = widths[0]
        self.stages = nn.Sequential()
        for stage, width in enumerate(widths, start=1):
            for block in range(1, depth + 1):
                self.stages.add_module(
                    f"s{stage}b{block}", BasicBlock((before, width), norm, project)
                )
                before = width
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(before, classes)
        kaiming_convs(self)
        if not norm:
            self._shrink_branches()

    @torch.no_grad()
    def _shrink_branches(self) -> None:
        for block in self.stages:
            assert isinstance(block, BasicBlock)
            block.conv2.weight.mul_(len(self.stages) ** -0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.flatten(self.pool(self.stages(self.stem(x)))))
