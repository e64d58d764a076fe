"""Kernel-shaped direct feedback: the error as a constant map, through a convolution's own geometry."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from feedbackward.errors import AttachError
from feedbackward.operators.base import Operator, Shape, Weights
from feedbackward.operators.layer import LayerForm, LayerShaped


@dataclass(frozen=True)
class LayerKernel(Operator):
    r"""`B: [C, c_in, *k]` from a source of C units to the input of a convolution, in that convolution's geometry.

    The error is repeated at every position of the convolution's output. From there it goes back through `B` as it would
    through the layer's own weight: :math:`\delta h = \mathrm{conv}^\top(d\, 1_{H' \times W'}, B)`, with the same stride,
    padding and dilation. So the signal is constant over space except at the borders and between strides. `B` has no groups:
    every unit reaches every channel. For a transposed convolution the kernel is `[c_in, C, *k]`. One that is called with
    `output_size` is refused: its output may have several sizes for one size of its input, and the error does not tell which.

    form: the convolution's shape and geometry.
    init, scale: those of :class:`LayerShaped`, for a layer with C outputs.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> layer = nn.Conv2d(4, 6, 3, padding=1)
        >>> form = fb.operators.LayerForm.of(layer)
        >>> operator = fb.operators.LayerKernel(form)
        >>> weights = operator.create((3,), (4, 5, 5), torch.Generator())  # from three classes
        >>> tuple(weights[0].shape)
        (3, 4, 3, 3)
        >>> tuple(operator.send(weights, torch.randn(2, 3), (4, 5, 5)).shape)
        (2, 4, 5, 5)
    """

    sized = False

    form: LayerForm
    init: str = "xavier_uniform"
    scale: float = 1.0

    def fit(self, source: Shape, site: Shape, seed: int) -> Operator:
        if self.form.output_size:
            raise AttachError(
                "kernel feedback repeats the error over the output of this transposed convolution, whose size each call chooses "
                "with `output_size`. Set `output_padding` in the layer instead, leave the layer out with `sites=`, or use FA or DFA."
            )
        return self

    def create(self, source: Shape, site: Shape, generator: torch.Generator) -> Weights:
        return self._layer(source, site).create(source, site, generator)

    def send(self, weights: Weights, d: Tensor, site: Shape) -> Tensor:
        d = d.flatten(1)
        grid = self._grid(site)
        error = d.reshape(*d.shape, *[1] * len(grid)).expand(*d.shape, *grid)
        return self._layer(tuple(d.shape[1:]), site).send(weights, error, site)

    def macs(self, source: Shape, site: Shape) -> int:
        return self._layer(source, site).macs((math.prod(source), *self._grid(site)), site)

    def bytes(self, source: Shape, site: Shape) -> int:
        return self._layer(source, site).bytes(source, site)

    def _layer(self, source: Shape, site: Shape) -> LayerShaped:
        """The feedback of a layer like this one, with an output channel for every unit of the source."""
        ends = (math.prod(source), site[0])
        shape = (*(reversed(ends) if self.form.transposed else ends), *self.form.shape[2:])
        return LayerShaped(replace(self.form, shape=shape, groups=1), self.init, self.scale)

    def _grid(self, site: Shape) -> Shape:
        """The space of the layer's output for an input `site: [c, *space]`."""
        f, grid = self.form, []
        for i, (n, k) in enumerate(zip(site[1:], f.shape[2:], strict=True)):
            reach = f.dilation[i] * (k - 1)
            if f.transposed:
                grid.append(
                    (n - 1) * f.stride[i] - 2 * f.padding[i] + reach + f.output_padding[i] + 1
                )
                continue
            last = len(f.stride) - 1 - i  # F.pad counts axes from the last
            padding = 2 * f.padding[i] + sum(f.pad[2 * last : 2 * last + 2])
            grid.append((n + padding - reach - 1) // f.stride[i] + 1)
        return tuple(grid)
