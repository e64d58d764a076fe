"""Nets that are not among ours: of the user's own, or of a library."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from feedbackward.errors import ConfigError
from feedbackward.experiment.imported import imported
from feedbackward.experiment.nets.libraries import LIBRARIES


def build_custom(
    name: str,
    in_shape: tuple[int, ...],
    classes: int,
    norm: bool,
    task: str = "classification",
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The net `package.module:callable`, `path/to/file.py:callable`, `timm:name` or `hf:type`.

    A callable is given those of `in_shape` and `classes` that its signature names, and `options` as further keywords.
    One that only takes `**kwargs` gets neither, since it may pass them on to code that knows neither.
    `norm=False` is passed where the signature names `norm`, and refused where it does not. What the callable
    itself raises is not caught. Raises ConfigError if it cannot be found, called so, or gives no `nn.Module`.
    """
    function = _resolve(name, task)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some callables of C extensions have none
        signature = inspect.Signature()
    offered: dict[str, Any] = {"in_shape": in_shape, "classes": classes}
    options = dict(options or {})
    if taken := [key for key in (*offered, "norm") if key in options]:
        raise ConfigError(
            f"model_options of the net {name!r} names {taken[0]!r}, which the data or `norm` decides: leave it out"
        )
    if not norm:
        if "norm" not in signature.parameters:
            raise ConfigError(
                f"norm=False cannot be applied to the net {name!r}: it takes no argument `norm`. "
                "Give it one, or leave norm at its default."
            )
        offered["norm"] = False
    wanted = {key: value for key, value in offered.items() if key in signature.parameters}
    wanted |= options
    try:
        signature.bind(**wanted)
    except TypeError as error:
        raise ConfigError(
            f"the net {name!r} has the signature {signature} and cannot be called with "
            f"{', '.join(wanted) or 'no arguments'} ({error}). Only in_shape and classes are passed, by "
            "keyword: give its other arguments default values, or name them in model_options."
        ) from error
    model = function(**wanted)
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"the net {name!r} returned a {type(model).__name__}, expected a torch.nn.Module: "
            "let the callable return the model."
        )
    return model


def _resolve(name: str, task: str) -> Callable[..., Any]:
    library, _, net = name.partition(":")
    if library in LIBRARIES:
        return functools.partial(LIBRARIES[library], net, task=task)
    function = imported(name, "net")
    if isinstance(function, nn.Module) or not callable(function):
        raise ConfigError(
            f"the net {name!r} is a {type(function).__name__}, expected a function or class that builds the "
            "model, since every run needs its own: wrap it in a function."
        )
    return function
