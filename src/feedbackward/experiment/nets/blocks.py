"""The two building blocks of the plain nets, with one named module per possible site."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import nn

from feedbackward.errors import ConfigError

Shape = tuple[int, int, int]
"""Channels, height and width of one input image, without the batch."""


def conv_block(
    widths: tuple[int, int], norm: bool, after: Mapping[str, nn.Module] | None = None, **conv: Any
) -> nn.Sequential:
    """`conv`, `norm` (if wanted), `relu`, then the modules of `after`; `conv` are `nn.Conv2d`'s options.

    [N, widths[0], H, W] -> [N, widths[1], H', W']. The convolution has a bias only where no norm follows:
    the norm's own shift would make it redundant. An absent norm leaves no `nn.Identity` behind, whose
    output would be the very tensor of its input and so make a second name for one site.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv=nn.Conv2d(*widths, bias=not norm, **conv)
    )
    if norm:
        layers["norm"] = nn.BatchNorm2d(widths[1])
    layers["relu"] = nn.ReLU()
    layers.update(after or {})
    return nn.Sequential(layers)


def linear_block(
    widths: tuple[int, int],
    after: Mapping[str, nn.Module] | None = None,
    activation: type[nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """`fc` and the activation, then the modules of `after`: [N, widths[0]] -> [N, widths[1]]."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(fc=nn.Linear(*widths))
    layers[activation.__name__.lower()] = activation()
    layers.update(after or {})
    return nn.Sequential(layers)


def kaiming_convs(model: nn.Module) -> None:
    """He's initialisation of all convolutions, N(0, 2 / (k * k * c_out)), biases zero (He et al. 2015).

    Linear layers and norms keep PyTorch's default, as in the usual VGG and ResNet code.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def set_dropout(model: nn.Module, p: float) -> None:
    """Give the model's dropout layers the probability `p`; where it has none, put one after each hidden linear block.

    Raises ConfigError where it has neither.
    """
    found = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    for module in found:
        module.p = p
    hidden = [
        m
        for m in model.modules()
        if isinstance(m, nn.Sequential) and "fc" in m._modules and len(m._modules) > 1
    ]
    for block in hidden if not found else ():
        block.add_module("drop", nn.Dropout(p).train(block.training))
    if not found and not hidden:
        raise ConfigError(
            f"{type(model).__name__} has no place for dropout, neither a dropout layer nor a hidden linear block: leave dropout at "
            "its default, or give the net such layers."
        )
