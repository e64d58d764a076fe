"""Nets of the user's own, named `package.module:callable`."""

import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

from torch import nn

from feedbackward.errors import ConfigError


def build_custom(name: str, in_shape: tuple[int, ...], classes: int, norm: bool) -> nn.Module:
    """Call `package.module:callable` with those of `in_shape` and `classes` that its signature names.

    A callable that only takes `**kwargs` gets neither, since it may pass them on to code that knows neither.
    `norm=False` is passed where the signature names `norm`, and refused where it does not. What the callable
    itself raises is not caught. Raises ConfigError if it cannot be found, called so, or gives no `nn.Module`.
    """
    function = _resolve(name)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some callables of C extensions have none
        signature = inspect.Signature()
    offered: dict[str, Any] = {"in_shape": in_shape, "classes": classes}
    if not norm:
        if "norm" not in signature.parameters:
            raise ConfigError(
                f"norm=False cannot be applied to the net {name!r}: it takes no argument `norm`. "
                "Give it one, or leave norm at its default."
            )
        offered["norm"] = False
    wanted = {key: value for key, value in offered.items() if key in signature.parameters}
    try:
        signature.bind(**wanted)
    except TypeError as error:
        raise ConfigError(
            f"the net {name!r} has the signature {signature} and cannot be called with "
            f"{', '.join(wanted) or 'no arguments'} ({error}). Only in_shape and classes are passed, by "
            "keyword: give its other arguments default values."
        ) from error
    model = function(**wanted)
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"the net {name!r} returned a {type(model).__name__}, expected a torch.nn.Module: "
            "let the callable return the model."
        )
    return model


def _resolve(name: str) -> Callable[..., Any]:
    try:
        function = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"the net {name!r} could not be imported ({error}): expected package.module:callable. "
            "Check the spelling, or put the folder it lies in on PYTHONPATH."
        ) from error
    if isinstance(function, nn.Module) or not callable(function):
        raise ConfigError(
            f"the net {name!r} is a {type(function).__name__}, expected a function or class that builds the "
            "model, since every run needs its own: wrap it in a function."
        )
    return function
