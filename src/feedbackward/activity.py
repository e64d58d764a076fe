"""Activities: the tensors of a forward pass at which a network is cut, or whose error is sent.

A *site* is an activity at which the network is cut; a *source* is one whose error becomes known during backward. What rules
ask of either is in their classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from feedbackward.operators.layer import LayerForm

# the place of a call's first argument
FIRST = "[0][0]"
# the call of a point that stands for all calls of its module in a pass
EVERY = -1


@dataclass(frozen=True)
class HookPoint:
    """A place in the forward pass: the input or the output of one call of one module.

    `leaf` counts the leaves of a structured output (tuple, dict, ModelOutput); None for a plain tensor. `place` is where an
    input is among the call's arguments and keywords. `call` is `EVERY` for the outputs of all calls together.
    """

    module: str
    # "input" or "output"
    kind: str
    call: int = 0
    leaf: int | None = None
    place: str = FIRST


@dataclass(frozen=True)
class Activity:
    """A tensor of the forward pass: its name, its hook points, and its shape without the batch.

    tokens: how many of the leading dimensions of `shape` are token dimensions. It is 0 unless the layer that made the
        tensor works on the last dimension only. Of an activity of every call (:attr:`every`) the calls are the first.
    unflattened: of a vector that a flatten made of a map, the shape of the map: channels, then two or three dimensions of
        space. Otherwise empty.
    apart: whether its tokens are others than those whose error is sent, as an encoder's are where a decoder makes the output.
        Each of them then gets the sum of the errors.
    """

    name: str
    points: tuple[HookPoint, ...]
    shape: tuple[int, ...]
    tokens: int = 0
    unflattened: tuple[int, ...] = ()
    apart: bool = False

    @property
    def map(self) -> tuple[int, ...]:
        """`[c, *space]` of a map with one to three dimensions of space, also if a flatten made it a vector. Otherwise empty."""
        if len(self.shape) in (2, 3, 4) and not self.tokens:
            return self.shape
        return self.unflattened

    @property
    def every(self) -> bool:
        """Whether it is what a module returns in all of its calls, stacked behind the batch: a cell's state in time."""
        return any(point.call == EVERY for point in self.points)


class Site(Activity):
    """An activity at which the network is cut: everything above sees it detached.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.DFA(), example=x)
        >>> site = learner.sites[0]
        >>> site.name, site.shape
        ('1', (8,))
    """


class Source(Activity):
    """An activity whose error is sent to sites.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.DFA(), example=x)
        >>> learner.source.name, learner.source.shape  # by default the model's output
        ('2', (3,))
    """


@dataclass(frozen=True)
class PreActivation(Site):
    """A layer's output that reaches the next layer through nothing but an elementwise function.

    activation: that function, or the identity.
    """

    activation: Callable[[Tensor], Tensor] = field(kw_only=True, compare=False)


class ModelInput(Site):
    """The input of the whole model. It depends on no parameter, so no pass sends a signal there by itself."""


@dataclass(frozen=True)
class LayerAbove:
    """A convolution or Linear layer that runs between a site and the source.

    form: the shape and geometry of its weight. entering, leaving: the shapes of its input and its output without the batch.
    """

    form: LayerForm
    entering: tuple[int, ...]
    leaving: tuple[int, ...]


@dataclass(frozen=True)
class SiteInContext(Site):
    """An activity, and the layers that run after it.

    above: the lowest first. What makes the class scores, transposed convolutions, shortcut projections (1x1 with a stride)
        and layers that are called several times are left out.
    input: the input of the model, if it has one of floating-point numbers.
    """

    above: tuple[LayerAbove, ...] = field(kw_only=True, compare=False)
    input: ModelInput | None = field(kw_only=True, compare=False)


@dataclass(frozen=True)
class LayerInput(Site):
    """The input of one layer, cut for that layer alone.

    Other users of the same tensor, such as a skip path, stay connected. A chain feeds the input from the layer's own
    output, through weights of the layer's own form.

    source: the layer's output.
    form: the shape and geometry of the layer's weight.
    weight: the name of that weight in the model.
    below: the output of the layer before, if only an elementwise activation lies between; otherwise what does, in words.
    dominates: whether everything below reaches the source of the rule's error through this layer's output only.
    branches: the inputs of the residual branches that begin with this layer, or words if no module begins a branch.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.FA(), example=x)
        >>> layer_input = learner.sites[0]
        >>> layer_input.name, layer_input.shape, layer_input.weight
        ('2.input', (8,), '2.weight')
    """

    source: Source = field(kw_only=True)
    form: LayerForm = field(kw_only=True)
    weight: str = field(kw_only=True)
    below: PreActivation | str = field(kw_only=True)
    dominates: bool = field(kw_only=True)
    branches: tuple[Site | str, ...] = field(kw_only=True, default=())
