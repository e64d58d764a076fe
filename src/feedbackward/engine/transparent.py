"""A learner looks like its model from outside: its signature, and what the model has and the learner does not."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from typing import Any, NoReturn

import torch
from torch import nn

from feedbackward.errors import FeedbackError


class Transparent:
    """A `forward` that takes any arguments, with the signature of the model's own."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__doc__ = function.__doc__

    def __get__(self, learner: nn.Module | None, kind: type | None = None) -> Any:
        if learner is None:
            return self.function
        if torch.compiler.is_compiling():
            # a compiler does not know bound methods that it has to make
            return functools.partial(self.function, learner)
        return _Bound(self.function, learner)


class _Bound:
    """The `forward` of one learner."""

    def __init__(self, function: Callable[..., Any], learner: nn.Module) -> None:
        self.__func__, self.__self__ = function, learner
        self.__doc__ = function.__doc__

    @property
    def __signature__(self) -> inspect.Signature:
        model: Any = self.__self__.model
        return inspect.signature(model.forward)

    @property
    def __code__(self) -> Any:
        # torch.export asks for it
        return self.__func__.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__func__(self.__self__, *args, **kwargs)


def borrowed(model: nn.Module, name: str, under: Callable[[], AbstractContextManager[Any]]) -> Any:
    """What the model calls `name`. A method of its own runs within `under()`: it may call the model, which then trains."""
    value = getattr(model, name)
    own = isinstance(value, MethodType) and value.__self__ is model and not hasattr(nn.Module, name)
    if not own:
        return value

    @functools.wraps(value)
    def method(*args: Any, **kwargs: Any) -> Any:
        with under():
            return value(*args, **kwargs)

    return method


class Inert:
    """A hook that does not ride along: in a copy or a file of its module stands a function that does nothing.

    The file can be read without this package. A copy of the learner installs hooks of its own.
    """

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")

    @property
    def __name__(self) -> str:
        raise ScriptError(_NO_SCRIPT)


class FirstHook(Inert):
    """A hook that stays before all others."""


class ScriptError(FeedbackError, AttributeError):
    """A compiler of source text asks a hook for its name: whoever else does takes it for a hook without one."""


_NO_SCRIPT = (
    "torch.jit.script cannot compile a model with a learner, whose hooks are Python: script what `learner.detach()` gives back, "
    "or compile with `torch.compile(learner)`."
)


def refuse_script() -> NoReturn:
    """What torch.jit.script is told of a learner."""
    raise FeedbackError(_NO_SCRIPT)
