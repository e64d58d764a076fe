"""Local learning with auxiliary networks made of layers above."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from feedbackward.activity import LayerAbove, Site, SiteInContext, Source
from feedbackward.errors import AttachError
from feedbackward.graph import Graph, Local
from feedbackward.operators import Shape
from feedbackward.operators.layer import LayerForm
from feedbackward.rule import Rule
from feedbackward.rules.local.heads import CONVS, NORMS, POOLS, Reader, count_classes, per_token


@dataclass(frozen=True)
class AugLocal(Rule):
    r"""AugLocal: a local loss trains every segment through a small copy of the network above it.

    .. math::
        \delta h_l = \partial\, \mathrm{CE}(A_l(h_l), y) / \partial h_l, \qquad
        d_l = \max\bigl(1, \mathrm{round}(d - \tau (d - 1)\, \tfrac{l}{K - 1})\bigr), \qquad l = 0 \ldots K - 1

    :math:`A_l` has the form of :math:`d_l` layers, taken at even distances from those above the site: of M layers the
    :math:`\lfloor i M / d_l + 1/2 \rfloor`-th, i = 1 ... :math:`d_l`. It has weights of its own, trained by the same loss. After
    each layer stand batch norm (layer norm for tokens) and ReLU, then the average over space and a linear classifier. A
    convolution keeps its channels, kernel, stride and padding; maps come to it averaged to the space of its own input, so
    that its output has the size that it has in the network. Layers of maps are convolutions, and the fully connected ones
    above them, which read averages over space; layers of vectors and tokens are Linear. No error travels between segments.
    The part above the last site learns by the network's own loss.

    Call `learner.target(y)` with class indices before every forward pass; what multiplies the loss goes into its `scale`.

    depth: d, the layers of the lowest site's auxiliary network; none are added where the network itself has fewer.
    taper: :math:`\tau`, how much of that depth is lost on the way to the last site: 0 to 1.

    Ma, Wu, Si & Tan, "Scaling Supervised Local Learning with Augmented Auxiliary Networks", ICLR 2024 (arXiv:2402.17318). The
    authors cut between residual blocks and copy whole blocks, with their skip paths; here the copies are of single layers.
    Inferred: norm and activation where the network has others, and what becomes of vectors and tokens.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import torch.nn.functional as F
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.rules.AugLocal(), example=x)
        >>> learner.target(y)
        >>> F.cross_entropy(learner(x), y).backward()
        >>> all(p.grad is not None for p in learner.parameters())
        True
    """

    depth: int = 2
    taper: float = 0.5

    name = "auglocal"
    label = "AugLocal"
    paper = "Ma et al. 2024"
    feeds = SiteInContext
    needs = "target"
    linear = False
    unlocked = "update"
    learned = True

    def __post_init__(self) -> None:
        if self.depth < 1 or not 0 <= self.taper <= 1:
            raise AttachError(f"{self.label} needs depth >= 1 and 0 <= taper <= 1, got {self}.")

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        local = []
        for place, site in enumerate(sites):
            lost = self.taper * (self.depth - 1) * place / max(1, len(sites) - 1)
            depth = max(1, round(self.depth - lost))
            network = partial(self.auxiliary, site, source, depth)
            local.append(Local(source, site, network, self.local_loss))
        return Graph(tuple(sites), local=tuple(local))

    def auxiliary(self, site: Site, source: Source, depth: int) -> nn.Module:
        assert isinstance(site, SiteInContext)
        classes = count_classes(self.label, site, source)
        layers = _evenly(_fitting(site), depth)
        norm = nn.LayerNorm if per_token(site, source) else nn.BatchNorm1d
        return _Copies(Reader(site, source, site.map[1:]), layers, norm, classes)

    def local_loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target.flatten())


def _fitting(site: SiteInContext) -> list[LayerAbove]:
    """The layers above that may follow the site: convolutions of maps like it, then layers of vectors."""
    if not site.map:
        return [layer for layer in site.above if not layer.form.stride]
    convolutions = [
        i for i, layer in enumerate(site.above) if len(layer.form.stride) == len(site.map) - 1
    ]
    last = convolutions[-1] if convolutions else -1
    return [
        layer
        for i, layer in enumerate(site.above)
        if i in convolutions or (i > last and not layer.form.stride and len(layer.entering) == 1)
    ]


def _evenly(layers: Sequence[LayerAbove], depth: int) -> list[LayerAbove]:
    if depth >= len(layers):
        return list(layers)
    # halves are rounded up, in integers
    places = [(2 * len(layers) * i + depth) // (2 * depth) for i in range(1, depth + 1)]
    return [layers[place - 1] for place in places]


class _Copies(nn.Module):
    """Layers of the form of others, and a classifier: `[M, C]` scores."""

    def __init__(
        self,
        reader: Reader,
        layers: Sequence[LayerAbove],
        norm: Callable[[int], nn.Module],
        classes: int,
    ) -> None:
        super().__init__()
        self.reader = reader
        shape = reader.shape if reader.space else (reader.width,)
        steps: list[nn.Module] = []
        for layer in layers:
            if layer.form.stride:
                made, shape = _convolution(layer, shape)
            else:
                made, shape = _linear(layer.form, shape, norm)
            steps += made
        self.steps = nn.Sequential(*steps, *_averaged(shape), nn.Linear(shape[0], classes))

    def forward(self, h: Tensor) -> Tensor:
        scores: Tensor = self.steps(self.reader.as_map(h) if self.reader.space else self.reader(h))
        return scores


def _convolution(layer: LayerAbove, shape: Shape) -> tuple[list[nn.Module], Shape]:
    """A convolution of a map of this shape, and the shape that it makes."""
    form, place = layer.form, len(shape) - 2
    channels, kernel = form.shape[0], form.shape[2:]
    groups = form.groups if not shape[0] % form.groups else 1
    conv = CONVS[place]
    norm = NORMS[place]
    steps = _pooled(shape, layer.entering[1:])
    if form.pad:
        steps.append((nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)[place](form.pad))  # type: ignore[arg-type]
    geometry = (kernel, form.stride, form.padding, form.dilation, groups)
    made = conv(shape[0], channels, *geometry, bias=False)  # type: ignore[arg-type]
    return [*steps, made, norm(channels), nn.ReLU()], layer.leaving


def _linear(
    form: LayerForm, shape: Shape, norm: Callable[[int], nn.Module]
) -> tuple[list[nn.Module], Shape]:
    made = nn.Linear(shape[0], form.shape[0], bias=False)
    return [*_averaged(shape), made, norm(form.shape[0]), nn.ReLU()], (form.shape[0],)


def _averaged(shape: Shape) -> list[nn.Module]:
    """From a map to the averages over its space."""
    if len(shape) == 1:
        return []
    return [*_pooled(shape, (1,) * (len(shape) - 1)), nn.Flatten()]


def _pooled(shape: Shape, space: Shape) -> list[nn.Module]:
    if shape[1:] == tuple(space):
        return []
    return [POOLS[len(space) - 1](tuple(space))]
