"""Running a model on an example: as training runs it, and without a trace on the model or the example."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from feedbackward.errors import AttachError, FeedbackError
from feedbackward.model.attributes import PLAIN
from feedbackward.model.state import all_trainable, preserved, training_mode, unchanged_parameters


class Given(NamedTuple):
    """The inputs of a pass as the model was called with them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def leaves(self) -> Sequence[Any]:
        """All that is in them. Most passes get one tensor, for which opening a tree would take long."""
        plain = not self.kwargs and all(type(arg) is Tensor for arg in self.args)
        return self.args if plain else tree_leaves(tuple(self))


def run(model: Callable[..., Any], example: Any) -> Any:
    """`model(example)` for a tensor, `model(*example)` for a tuple or list, `model(**example)` for a dict."""
    args, kwargs = arguments(example)
    return model(*args, **kwargs)


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments and the keywords that an example stands for."""
    if isinstance(example, Given):
        return example
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    if isinstance(example, dict) or hasattr(example, "keys"):
        return (), dict(example)
    raise AttachError(
        f"the example must be a tensor, a tuple or a dict of the model's inputs, not {type(example).__name__}."
    )


def copied(example: Any) -> Any:
    """The example anew, for a pass that nobody asked for: a forward may take its inputs apart or change them in place.

    Raises AttachError for a generator or a stream, which can be read once only.
    """
    known: dict[int, Any] = {}

    def anew(leaf: Any) -> Any:
        if isinstance(leaf, (*PLAIN, nn.Module)):
            return leaf
        if id(leaf) not in known:
            known[id(leaf)] = _copy(leaf, known)
        return known[id(leaf)]

    return tree_map(anew, example)


def run_example(model: nn.Module, example: Any) -> Any:
    """The output of a copy of the example. Raises AttachError where the model cannot run on it."""
    inputs = copied(example)
    try:
        return run(model, inputs)
    except FeedbackError:
        raise
    except Exception as error:
        shapes = [tuple(t.shape) for t in tree_leaves(example) if isinstance(t, Tensor)]
        advice = (
            " Batch norm in training mode needs a batch of at least 2."
            if "more than 1 value" in str(error)
            else ""
        )
        raise AttachError(
            f"{type(model).__name__} failed on the example (tensors {shapes}): {error}.{advice} "
            "Pass an `example` that the model accepts, as tensor, tuple or dict."
        ) from error


@contextmanager
def as_in_training(
    model: nn.Module, whole: bool = True, batch_norms: bool = True
) -> Iterator[None]:
    """Passes in training mode; nothing of the model changes.

    Where `whole`, every parameter requires a gradient, so that the graph shows what depends on any.
    Unless `batch_norms`, these are in evaluation mode: no row of the batch depends on another one
    by them.
    """
    with ExitStack() as stack:
        stack.enter_context(preserved(model))
        stack.enter_context(unchanged_parameters(model))
        stack.enter_context(training_mode(model))
        stack.enter_context(torch.enable_grad())
        if whole:
            stack.enter_context(all_trainable(model))
        if not batch_norms:
            norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
            for norm in norms:
                norm.training = False
        yield


def _copy(leaf: Any, known: dict[int, Any]) -> Any:
    if isinstance(leaf, Tensor):
        return leaf if leaf.requires_grad else leaf.clone()
    if isinstance(leaf, torch.Generator):
        return leaf.clone_state()
    try:
        return copy.deepcopy(leaf, known)
    except Exception as error:
        if not isinstance(leaf, Iterator):
            return leaf
        raise AttachError(
            f"the inputs hold a {type(leaf).__name__}, which can be read once only, but more than one "
            "forward pass is needed here: give a list or a tensor of what it yields."
        ) from error
