"""Layers whose inputs are decorrelated, under any rule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feedbackward.errors import FeedbackError


class Decorrelated(nn.Module):
    r"""What a Linear layer or a convolution has that reads its input through a matrix `R`.

    .. math:: y = W\,(R\,x) + b, \quad R: [d, d]

    x are the d inputs of a Linear layer. Of a convolution they are the d = channels * kernel places of a patch. `R` starts as
    the identity, and :class:`Decorrelation` learns it from activities alone; it is a buffer, so no optimizer sees it.
    """

    R: Tensor
    # what the last training pass read, until a step of Decorrelation
    seen: Tensor | None
    sample: int

    def _look(self, x: Tensor) -> None:
        if self.training:
            with torch.no_grad():
                self.seen = self.patches(x.detach(), self.sample)

    def patches(self, x: Tensor, sample: int = 1) -> Tensor:
        """What the weights are multiplied with at each place of every so-many-th sample, [M, d], before `R`."""
        raise NotImplementedError


class DecorrelatedLinear(Decorrelated, nn.Linear):
    """An `nn.Linear` that reads its input through `R`; see :class:`Decorrelation`."""

    def forward(self, x: Tensor) -> Tensor:
        self._look(x)
        return F.linear(x @ self.R.t(), self.weight, self.bias)

    def patches(self, x: Tensor, sample: int = 1) -> Tensor:
        return torch.atleast_2d(x)[::sample].reshape(-1, x.shape[-1])


class _DecorrelatedConv(Decorrelated, nn.modules.conv._ConvNd):
    def forward(self, x: Tensor) -> Tensor:
        self._look(x)
        # W (R x) is one convolution: patches, which take the kernel's size in memory, are never made for it
        weight = (self.weight.flatten(1) @ self.R).view_as(self.weight)
        return self._conv_forward(x, weight, self.bias)

    def patches(self, x: Tensor, sample: int = 1) -> Tensor:
        dims = len(self.kernel_size)
        x = x if x.dim() == dims + 2 else x.unsqueeze(0)
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        x = F.pad(x[::sample], tuple(self._reversed_padding_repeated_twice), mode)
        windows = zip(self.kernel_size, self.stride, self.dilation, strict=True)
        for i, (side, step, gap) in enumerate(windows):
            x = x.unfold(i + 2, gap * (side - 1) + 1, step)[..., ::gap]
        places = x.permute(0, *range(2, dims + 2), 1, *range(dims + 2, 2 * dims + 2))
        return places.reshape(-1, self.R.shape[0])


class DecorrelatedConv1d(_DecorrelatedConv, nn.Conv1d):
    """An `nn.Conv1d` that reads patches through `R`; see :class:`Decorrelation`."""


class DecorrelatedConv2d(_DecorrelatedConv, nn.Conv2d):
    """An `nn.Conv2d` that reads patches through `R`; see :class:`Decorrelation`."""


class DecorrelatedConv3d(_DecorrelatedConv, nn.Conv3d):
    """An `nn.Conv3d` that reads patches through `R`; see :class:`Decorrelation`."""


_KINDS: dict[type[nn.Module], type[Decorrelated]] = {
    nn.Linear: DecorrelatedLinear,
    nn.Conv1d: DecorrelatedConv1d,
    nn.Conv2d: DecorrelatedConv2d,
    nn.Conv3d: DecorrelatedConv3d,
}


class Decorrelation:
    r"""Learns what the inputs of layers have in common, and takes it away.

    Makes layers of `model` :class:`Decorrelated` ones, in place, before `attach`: they keep their names and parameters, and get
    a buffer `R`. Call `step()` after the optimizer's. With the inputs :math:`\hat x = R x` of the last training pass and their
    mean products :math:`C = \overline{\hat x \hat x^\top}`:

    .. math:: R \leftarrow R - \eta\,\big((1 - \kappa)\,(C - \operatorname{diag} C) + \kappa\,\operatorname{diag}(C - 1)\big) R

    It needs neither labels nor a backward pass, and each layer learns for itself, so a rule stays as unlocked as it was. Chains
    (KP, FA) refuse such layers: their feedback would have to stand for `W R`. At its end
    :math:`\hat x` has uncorrelated entries, with :math:`\kappa > 0` of size 1. A step costs d^2 products for each place
    that is sampled and d^3 for `R`; a pass costs d^2 for each input of a Linear layer and for each output channel of a
    convolution.

    model: its Linear layers and ungrouped Conv1d, Conv2d and Conv3d layers are changed.
    rate: :math:`\eta`.
    variance: :math:`\kappa`, from 0 to 1.
    sample: every so-many-th sample of a batch is looked at.
    layers: the names of the layers to change; by default all but those whose weight other modules share.

    Source: Ahmad, Schrauwen, van Gerven 2022 ("Constrained parameter inference as a principle for learning"); Dalm, Offergeld,
    Ahmad, van Gerven 2024 ("Efficient deep learning with decorrelated backpropagation").

    Raises FeedbackError for layers that cannot be changed, and in `step` where no training pass came before or inputs grew
    without bound.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> from feedbackward.decorrelation import Decorrelation
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> decorrelation = Decorrelation(model, rate=0.01)
        >>> learner = fb.attach(model, fb.DFA(), example=x)
        >>> optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
        >>> nn.functional.cross_entropy(learner(x), y).backward()
        >>> optimizer.step()
        >>> decorrelation.step()
        >>> [tuple(layer.R.shape) for layer in decorrelation.layers]
        [(4, 4), (8, 8)]
    """

    def __init__(
        self,
        model: nn.Module,
        rate: float,
        variance: float = 0.5,
        sample: int = 10,
        layers: Iterable[str] | None = None,
    ) -> None:
        if not rate > 0 or not 0 <= variance <= 1 or sample < 1:
            raise FeedbackError(
                f"Decorrelation takes a rate above 0, a variance from 0 to 1 and a sample of at least 1, not {rate}, {variance} and "
                f"{sample}."
            )
        self.rate, self.variance = rate, variance
        found = _fitting(model) if layers is None else [_named(model, name) for name in layers]
        if not found:
            raise FeedbackError(
                "Decorrelation found no Linear or convolution layer with weights of its own: name some with layers=."
            )
        self.layers = [_changed(layer, sample) for layer in found]

    @torch.no_grad()
    def step(self) -> None:
        """One update of every `R` from the last training pass."""
        if all(layer.seen is None for layer in self.layers):
            raise FeedbackError(
                "Decorrelation.step() follows a training pass: call the model in training mode first."
            )
        for layer in self.layers:
            seen, layer.seen = layer.seen, None
            if seen is None:  # not called in this pass
                continue
            R = layer.R
            x = seen.to(R.dtype) @ R.t()
            C = x.t() @ x / len(x)
            own = C.diagonal()
            if not own.sum().isfinite():
                raise FeedbackError(
                    f"the decorrelated inputs of a {type(layer).__name__} with {len(R)} inputs grew without bound: lower the "
                    f"rate, which is {self.rate}. It must be well below 2 over the largest eigenvalue of their products."
                )
            common = (1 - self.variance) * C
            common.diagonal().copy_(self.variance * (own - 1))
            R.sub_(common @ R, alpha=self.rate)


def _fitting(model: nn.Module) -> list[nn.Module]:
    uses = Counter(p for module in model.modules() for p in module.parameters(recurse=False))
    return [m for m in model.modules() if _why_not(m) is None and uses[m.weight] == 1]  # type: ignore[index]


def _named(model: nn.Module, name: str) -> nn.Module:
    try:
        layer = model.get_submodule(name)
    except AttributeError as error:
        raise FeedbackError(f"the model has no module {name!r} to decorrelate.") from error
    if (why := _why_not(layer)) is not None:
        raise FeedbackError(f"the inputs of {name!r} cannot be decorrelated: {why}.")
    return layer


def _why_not(layer: nn.Module) -> str | None:
    if type(layer) not in _KINDS:
        kinds = ", ".join(f"nn.{kind.__name__}" for kind in _KINDS)
        return f"it is a {type(layer).__name__}, not one of {kinds}"
    return None if getattr(layer, "groups", 1) == 1 else "its channels are in groups"


def _changed(layer: nn.Module, sample: int) -> Decorrelated:
    """The same module, of another class: whoever holds it, and its hooks, stay."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    layer.register_buffer("R", torch.eye(weight[0].numel()).to(weight))
    layer.__class__ = _KINDS[type(layer)]
    assert isinstance(layer, Decorrelated)
    layer.seen, layer.sample = None, sample
    return layer
