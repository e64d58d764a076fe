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
    "normal",
)
MIRROR_ROUNDS = 6  # a chain of L layers then begins at a cosine of about (1 + 2 ** -6) ** (-L / 2)


@dataclass(frozen=True)
class LayerForm:
    """What a layer does with its weight: the shape of it, and for convolutions their geometry.

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
        """The output padding with which a transposed convolution makes these places of an input of that space."""
        sizes = zip(
            places, space, self.shape[2:], self.stride, self.dilation, self.padding, strict=True
        )
        return tuple(
            out - ((n - 1) * stride - 2 * padding + dilation * (k - 1) + 1)
            for out, n, k, stride, dilation, padding in sizes
        )

    @staticmethod
    def between(source: Shape, site: Shape, size: int) -> LayerForm:
        """A convolution from a site `[c, H, ...]` to a source `[C, H2, ...]`, whatever lies between them: its stride along each axis
        is H / H2, rounded; its kernel has that side (one more where the borders ask for it), with a stride s > 1 s - 1 more.
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
    r"""`B` of the shape of the layer's `W`; the signal is what the layer's own backward gives with `B` for `W`.

    Linear: :math:`\delta h = \delta a\, B`. Convolution: the transposed convolution of :math:`\delta a` with `B`, same
    stride, padding, dilation and groups; the adjoint of the padding for other padding modes.

    init: `"zeros"`; `"mirrored"`: what the layer's response to noise says of its weight when it is attached, see `measure`;
        `"xavier_uniform"`: U(-b, b), b = sqrt(6 / (fan_in + fan_out)); `"kaiming_uniform"`: b = sqrt(6 / fan_in);
        `"kaiming_fan_out"`: b = sqrt(6 / fan_out); `"like_layer"`: b = 1 / sqrt(fan_in), PyTorch's own initialisation of these
        layers; `"normal"`: N(0, 1).
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
        squares = {
            "zeros": 0.0,
            "mirrored": 0.0,
            "xavier_uniform": 6 / (fan_in + fan_out),
            "kaiming_uniform": 6 / fan_in,
            "kaiming_fan_out": 6 / fan_out,
            "like_layer": 1 / fan_in,
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
        r"""For the init `"mirrored"`: learn to predict the layer's response to Gaussian noise, by the delta rule,

        .. math:: B \leftarrow B + \tfrac{M}{M + n}\, \tfrac1M (\xi W^\top - \xi B^\top)^\top \xi, \quad \xi: [M, n]

        with as many samples (times places, for a kernel) as the layer has inputs, M = n: each of `MIRROR_ROUNDS` rounds halves the
        expected square of the error. The layer's input alone is changed, without bias, norm or activation.
        """
        if self.init != "mirrored" or weights[0].is_meta:
            return weights
        wide = torch.promote_types(weights[0].dtype, torch.float32)
        B, layer = weights[0].to(wide), layer.to(weights[0].device, wide)
        macs = self.macs(source, site)
        inputs, places = macs / math.prod(source), macs / math.prod(self.form.shape)
        samples = math.ceil(inputs / places)
        share = samples * places / (samples * places + inputs)
        for _ in range(MIRROR_ROUNDS):
            noise = torch.randn(self.noise_shape(samples, site), generator=generator).to(B)
            B = B + share * self.mirrored(layer - B, noise)  # by what B misses of the response
        return ((B * self.scale).to(weights[0].dtype),)

    def noise_shape(self, samples: int, site: Shape) -> tuple[int, ...]:
        """Of noise in place of the layer's input, and of the padding too, whose copies would be correlated."""
        return tuple(self.padded(torch.empty(1).expand(samples, *site)).shape)

    def mirrored(self, weight: Tensor, noise: Tensor) -> Tensor:
        """What the response of a layer with this weight to noise says of the weight: an estimate without bias, of its shape.

        The noise in it is about sqrt(inputs / (samples * places)) times the weights. `noise: [M, ...]` as `noise_shape` says.
        """
        unpadded = replace(self, form=replace(self.form, pad=()))
        return unpadded.average(weight, unpadded.project(weight, noise), noise)

    def send(self, weights: Weights, d: Tensor, site: Shape) -> Tensor:
        B = weights[0]  # the edge's forward weight may follow
        if not self.form.stride:
            return d @ B
        if not self.form.pad:
            return self._convolve_back(B, d, site)
        padded = [site[0], *(n + sum(self._pads(i)) for i, n in enumerate(site[1:]))]
        return self._unpad(self._convolve_back(B, d, tuple(padded)), site)

    def project(self, weight: Tensor, h: Tensor) -> Tensor:
        """What the layer makes of `h: [M, *site]` with this weight, without a bias: `send` is the adjoint of it."""
        if not self.form.stride:
            return h @ weight.t()
        return torch.ops.aten.convolution(self.padded(h), weight, None, *self._geometry())

    def correlate(self, weights: Weights, d: Tensor, h: Tensor, center: bool) -> Weights:
        """The layer's own weight gradient, whose form `B` has."""
        if center:
            h = h - h.mean([i for i in range(h.dim()) if i != 1], keepdim=True)
        if not self.form.stride:
            return (d.t() @ h,)
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
        """As torch's convolutions take it, for an output of these places made from an input of that space."""
        f = self.form
        extra = f.output_padding or (0,) * len(f.stride)
        if f.transposed and places is not None:
            # a call with `output_size` chooses it, perhaps another one for each batch
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
        """`h` with the padding that the layer applies before its convolution (other than zeros, or uneven)."""
        if not self.form.pad:
            return h
        return F.pad(
            h, self.form.pad, "constant" if self.form.pad_mode == "zeros" else self.form.pad_mode
        )

    def _pads(self, axis: int) -> tuple[int, int]:
        """Padding before and after a spatial axis; F.pad counts axes from the last."""
        start = 2 * (len(self.form.stride) - 1 - axis)
        return self.form.pad[start], self.form.pad[start + 1]

    def _unpad(self, padded: Tensor, site: tuple[int, ...]) -> Tensor:
        """The adjoint of the padding: what was copied to the border adds up at where it was copied from."""
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
    """Where each position of a padded axis was copied from; -1 for zeros."""
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
