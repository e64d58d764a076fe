"""Layer-shaped feedback: weights of the same shape and geometry as a Linear or convolution layer's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from feedbackward.errors import AttachError
from feedbackward.operators.base import Operator, Shape, Weights

LAYER_INITS = (
    "zeros",
    "mirrored",
    "xavier_uniform",
    "kaiming_uniform",
    "kaiming_fan_out",
    "like_layer",
    "like_weight",
    "normal",
)
MEASURED_INITS = ("mirrored", "like_weight")  # made from the weight that the layer has at `attach`
MIRROR_ROUNDS = 6  # a chain of L layers then begins at a cosine of about (1 + 2 ** -6) ** (-L / 2)


@dataclass(frozen=True)
class LayerForm:
    """How a layer uses its weight: the weight's shape, and the geometry of a convolution.

    A weight is `[outputs, inputs, *kernel]`, or `[inputs, outputs, *kernel]` where it is `transposed`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> layer = nn.Conv2d(4, 6, 3, padding=1)
        >>> form = fb.operators.LayerForm.of(layer)
        >>> form.shape, form.stride, form.padding
        ((6, 4, 3, 3), (1, 1), (1, 1))
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False
    padding: tuple[int, ...] = ()  # as the convolution itself applies it
    output_padding: tuple[int, ...] = ()
    pad: tuple[int, ...] = ()  # applied before, in the order of F.pad
    pad_mode: str = "zeros"
    # whether each call chooses the size of a transposed convolution's output
    output_size: bool = False

    @staticmethod
    def of(layer: nn.Module) -> LayerForm:
        """The form of a Linear, Conv1d/2d/3d or ConvTranspose1d/2d/3d."""
        weight: Tensor = layer.weight  # type: ignore[assignment]
        if isinstance(layer, nn.Linear):
            return LayerForm(tuple(weight.shape))
        assert isinstance(layer, nn.modules.conv._ConvNd)
        inner, pad = layer.padding, ()
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            inner, pad = (0,) * len(layer.stride), tuple(layer._reversed_padding_repeated_twice)  # type: ignore[assignment]
        return LayerForm(
            tuple(weight.shape),
            tuple(layer.stride),
            tuple(layer.dilation),
            layer.groups,
            layer.transposed,
            tuple(int(p) for p in inner),
            tuple(layer.output_padding),
            pad if any(pad) else (),
            layer.padding_mode,
        )

    def extra(self, places: Sequence[int], space: Sequence[int]) -> tuple[int, ...]:
        """The output padding with which a transposed convolution makes `places` outputs of an input of size `space`."""
        sizes = zip(
            places, space, self.shape[2:], self.stride, self.dilation, self.padding, strict=True
        )
        return tuple(
            out - ((n - 1) * stride - 2 * padding + dilation * (k - 1) + 1)
            for out, n, k, stride, dilation, padding in sizes
        )

    @staticmethod
    def between(source: Shape, site: Shape, size: int) -> LayerForm:
        """A convolution from a site `[c, H, ...]` to a source `[C, H2, ...]`, whatever lies between them.

        Its stride along each axis is H / H2, rounded. Its kernel has the side `size`, s - 1 more with a stride s > 1, and one
        more where the borders need it.
        """
        strides: list[int] = []
        sides: list[int] = []
        pads: list[int] = []
        for length, places in zip(site[1:], source[1:], strict=True):
            stride = max(1, round(length / places))
            reach = (
                places - 1
            ) * stride - length  # of the first weight's places, less the whole axis
            side = max(size + stride - 1, -reach)
            side += (side + reach) % 2
            strides, sides, pads = [*strides, stride], [*sides, side], [*pads, (side + reach) // 2]
        return LayerForm(
            (source[0], site[0], *sides), tuple(strides), (1,) * len(sides), padding=tuple(pads)
        )


@dataclass(frozen=True)
class LayerShaped(Operator):
    r"""`B` of the shape of a layer's `W`. The signal is what the layer's own backward pass gives with `B` in place of `W`.

    For a Linear layer it is :math:`\delta h = \delta a\, B`. For a convolution it is the transposed convolution of
    :math:`\delta a` with `B`, with the same stride, padding, dilation and groups, and with the adjoint of other padding modes.

    form: the layer's shape and geometry.
    init: `"zeros"`; `"mirrored"`: an estimate of the layer's weight from its response to noise, made by `attach`, see
        `measure`; `"xavier_uniform"`: U(-b, b) with b = sqrt(6 / (fan_in + fan_out)); `"kaiming_uniform"`: b = sqrt(6 / fan_in);
        `"kaiming_fan_out"`: b = sqrt(6 / fan_out); `"like_layer"`: b = 1 / sqrt(fan_in), PyTorch's own initialisation of these
        layers; `"like_weight"`: the root mean square is that of the layer's weight when `attach` is called, one number
        per layer (`"like_layer"` where that weight is zero); or `"normal"`: N(0, 1).
    scale: a factor on the initial weights.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> layer = nn.Conv2d(4, 6, 3, padding=1)
        >>> form = fb.operators.LayerForm.of(layer)
        >>> operator = fb.operators.LayerShaped(form)
        >>> weights = operator.create((6, 5, 5), (4, 5, 5), torch.Generator())
        >>> tuple(operator.send(weights, torch.randn(2, 6, 5, 5), (4, 5, 5)).shape)
        (2, 4, 5, 5)
    """

    sized = False

    form: LayerForm
    init: str = "xavier_uniform"
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.init not in LAYER_INITS:
            raise AttachError(
                f"unknown feedback initialisation {self.init!r}: choose one of {', '.join(LAYER_INITS)}."
            )

    @property
    def bound(self) -> float:
        """b of the initial weights U(-b, b); for every init their standard deviation is b / sqrt(3)."""
        shape = self.form.shape
        field = math.prod(shape[2:])
        fan_in, fan_out = shape[1] * field, shape[0] * field
        if self.form.transposed and not self.form.stride:  # PyTorch turns no convolution's fans
            fan_in, fan_out = fan_out, fan_in
        squares = {
            "zeros": 0.0,
            "mirrored": 0.0,
            "xavier_uniform": 6 / (fan_in + fan_out),
            "kaiming_uniform": 6 / fan_in,
            "kaiming_fan_out": 6 / fan_out,
            "like_layer": 1 / fan_in,
            "like_weight": 3.0,  # of standard deviation 1, until `measure`
            "normal": 3.0,
        }
        return self.scale * math.sqrt(squares[self.init])

    def create(self, source: Shape, site: Shape, generator: torch.Generator) -> Weights:
        B = torch.zeros(self.form.shape)
        if self.init == "normal":
            return (B.normal_(std=self.scale, generator=generator),)
        return (B.uniform_(-self.bound, self.bound, generator=generator),)

    @torch.no_grad()
    def measure(
        self,
        weights: Weights,
        layer: Tensor,
        source: Shape,
        site: Shape,
        generator: torch.Generator,
    ) -> Weights:
        r"""The initial weights, where they depend on the weight of the `layer`.

        `"like_weight"` takes over its root mean square. `"mirrored"` learns to predict the layer's response to Gaussian
        noise, by the delta rule:

        .. math:: B \leftarrow B + \tfrac{M}{M + n}\, \tfrac1M (\xi W^\top - \xi B^\top)^\top \xi, \quad \xi: [M, n]

        There are as many samples (times places, for a kernel) as the layer has inputs, M = n, so that each of `MIRROR_ROUNDS`
        rounds halves the expected square of the error. The noise replaces the layer's input; bias, norm and activation are
        left out.
        """
        if self.init not in MEASURED_INITS or weights[0].is_meta:
            return weights
        wide = torch.promote_types(weights[0].dtype, torch.float32)
        B, layer = weights[0].to(wide), layer.to(weights[0].device, wide)
        if self.init == "like_weight":
            # in place: a copy would be as large as the layer
            return (B.mul_(self._size(layer)).to(weights[0].dtype),)
        macs = self.macs(source, site)
        inputs, places = macs / math.prod(source), macs / math.prod(self.form.shape)
        samples = math.ceil(inputs / places)
        share = samples * places / (samples * places + inputs)
        for _ in range(MIRROR_ROUNDS):
            noise = torch.randn(self.noise_shape(samples, site), generator=generator).to(B)
            # by the part of the response that B does not predict
            B = B + share * self.mirrored(layer - B, noise)
        return ((B * self.scale).to(weights[0].dtype),)

    def _size(self, layer: Tensor) -> float:
        """The root mean square of a layer's weight; of its usual initial law where the weight is zero."""
        size = torch.linalg.vector_norm(layer).item() / math.sqrt(layer.numel())
        usual = replace(self, init="like_layer", scale=1.0).bound / math.sqrt(3)
        return size if size > 0 else usual

    def noise_shape(self, samples: int, site: Shape) -> tuple[int, ...]:
        """The shape of noise for the layer's padded input. Noise that is padded afterwards would be correlated."""
        return tuple(self.padded(torch.empty(1).expand(samples, *site)).shape)

    def mirrored(self, weight: Tensor, noise: Tensor) -> Tensor:
        """An unbiased estimate of a layer's weight from the layer's response to noise, of the weight's shape.

        Its noise is about sqrt(inputs / (samples * places)) times the weights. `noise: [M, ...]` has the shape `noise_shape`.
        """
        unpadded = replace(self, form=replace(self.form, pad=()))
        return unpadded.average(weight, unpadded.project(weight, noise), noise)

    def send(self, weights: Weights, d: Tensor, site: Shape) -> Tensor:
        B = weights[0]  # the edge's forward weight may follow
        if not self.form.stride:
            return d @ (B.t() if self.form.transposed else B)
        if not self.form.pad:
            return self._convolve_back(B, d, site)
        padded = [site[0], *(n + sum(self._pads(i)) for i, n in enumerate(site[1:]))]
        return self._unpad(self._convolve_back(B, d, tuple(padded)), site)

    def project(self, weight: Tensor, h: Tensor) -> Tensor:
        """The layer's output for `h: [M, *site]` with this weight, without a bias. `send` is the adjoint of this map."""
        if not self.form.stride:
            return h @ (weight if self.form.transposed else weight.t())
        return torch.ops.aten.convolution(self.padded(h), weight, None, *self._geometry())

    def correlate(self, weights: Weights, d: Tensor, h: Tensor, center: bool) -> Weights:
        """The layer's own weight gradient, which has the form of `B`."""
        if center:
            h = h - h.mean([i for i in range(h.dim()) if i != 1], keepdim=True)
        if not self.form.stride:
            return (h.t() @ d if self.form.transposed else d.t() @ h,)
        mask = (False, True, False)
        B = weights[0].to(d.dtype)  # only its shape is read
        h = self.padded(h)
        geometry = self._geometry(d.shape[2:], h.shape[2:])
        return (torch.ops.aten.convolution_backward(d, h, B, None, *geometry, mask)[1],)

    def macs(self, source: Shape, site: Shape) -> int:
        f = self.form
        if not f.stride:
            return math.prod(source[:-1]) * math.prod(f.shape)
        places = math.prod(site[1:]) if f.transposed else math.prod(source[1:])
        return places * math.prod(f.shape)

    def bytes(self, source: Shape, site: Shape) -> int:
        return 4 * math.prod(self.form.shape)

    def _convolve_back(self, B: Tensor, d: Tensor, site: tuple[int, ...]) -> Tensor:
        like = d.new_empty(1).expand(len(d), *site)  # only its shape is read
        mask = (True, False, False)
        geometry = self._geometry(d.shape[2:], site[1:])
        return torch.ops.aten.convolution_backward(d, like, B, None, *geometry, mask)[0]

    def _geometry(
        self, places: Sequence[int] | None = None, space: Sequence[int] = ()
    ) -> tuple[object, ...]:
        """The geometry as torch's convolutions take it, for an output of size `places` and an input of size `space`."""
        f = self.form
        extra = f.output_padding or (0,) * len(f.stride)
        if f.transposed and places is not None:
            # a call with `output_size` chooses it, and may choose another one for each batch
            extra = f.extra(places, space)
        return (
            f.stride,
            f.padding,
            f.dilation,
            f.transposed,
            extra,
            f.groups,
        )

    def padded(self, h: Tensor) -> Tensor:
        """`h` with the padding that the layer applies before its convolution, if it is not zeros or not even."""
        if not self.form.pad:
            return h
        return F.pad(
            h, self.form.pad, "constant" if self.form.pad_mode == "zeros" else self.form.pad_mode
        )

    def _pads(self, axis: int) -> tuple[int, int]:
        """The padding before and after a spatial axis. (F.pad counts axes from the last one.)"""
        start = 2 * (len(self.form.stride) - 1 - axis)
        return self.form.pad[start], self.form.pad[start + 1]

    def _unpad(self, padded: Tensor, site: tuple[int, ...]) -> Tensor:
        """The adjoint of the padding: gradients at the border are added to the positions that were copied there."""
        for axis, size in enumerate(site[1:]):
            index = torch.arange(size, device=padded.device)
            before, after = self._pads(axis)
            origin = _origin(index, before, after, self.form.pad_mode)
            inside = origin >= 0
            shape = list(padded.shape)
            shape[axis + 2] = size
            out = padded.new_zeros(shape)
            padded = out.index_add(
                axis + 2, origin[inside], padded.index_select(axis + 2, inside.nonzero().flatten())
            )
        return padded


def _origin(index: Tensor, before: int, after: int, mode: str) -> Tensor:
    """The position that each position of a padded axis was copied from, or -1 for zeros."""
    size = len(index)
    position = torch.arange(-before, size + after, device=index.device)
    if mode == "circular":
        return position % size
    if mode == "reflect":
        period = max(2 * (size - 1), 1)
        folded = position.abs() % period
        return torch.where(folded < size, folded, period - folded)
    if mode == "replicate":
        return position.clamp(0, size - 1)
    return torch.where((position >= 0) & (position < size), position, -1)
