"""Where a NaN or an infinity came from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from feedbackward.learner import Learner
from feedbackward.model.example import run


def first_non_finite(learner: Learner, inputs: Any) -> str:
    """Name what first became NaN or infinite, in words that end a sentence starting with "the loss is nan:".

    Weights are looked at first: the caller asks after a forward pass and before the next update, so a weight
    that is not finite now was made so by the last update, and the forward pass only shows it.
    """
    if not all(_finite(t) for t in tree_leaves(inputs)):
        return "the inputs hold it"
    named = {
        "the parameter": learner.model.named_parameters(),
        "the feedback weights of site": learner.feedback.named_parameters(),
        "the buffer": learner.model.named_buffers(),
    }
    for what, tensors in named.items():
        bad = [name.replace("/", ".") for name, tensor in tensors if not _finite(tensor)]
        if bad:
            others = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            return f"the last update made {what} '{bad[0]}'{others} non-finite"
    return _first_module(learner, inputs)


def _first_module(learner: Learner, inputs: Any) -> str:
    """Run the model once more and report the first module whose output is not finite."""
    found: list[str] = []
    names = {module: name for name, module in learner.model.named_modules()}

    def look(module: nn.Module, arguments: Any, output: Any) -> None:
        if not found and not all(_finite(t) for t in tree_leaves(output) if isinstance(t, Tensor)):
            found.append(names[module])

    handles = [module.register_forward_hook(look) for module in learner.model.modules()]
    try:
        with torch.no_grad(), learner.exact():
            run(learner, inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        return "every activity is finite, so it arose in the loss itself"
    return (
        f"it first appeared in the output of the layer '{found[0] or type(learner.model).__name__}'"
    )


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
