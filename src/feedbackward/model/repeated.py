"""The site that all calls of one module make together: a cell that a loop runs once per step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from feedbackward.activity import EVERY, HookPoint, Site, Source
from feedbackward.errors import AttachError, SiteError
from feedbackward.model.trace import Call, Trace


def every_call(
    trace: Trace, calls: Sequence[Call], leaf: int, source: Source, made: Tensor
) -> Site:
    """The site `[N, calls, ...]` of tensor number `leaf` of every call. `made`: the source as the trace recorded it.

    Raises SiteError where the calls do not make the same tensor again and again, and AttachError where call t of a source
    with as many steps does not make step t of it.
    """
    name = calls[0].name
    steps = [call.outputs[leaf][0] for call in calls]
    shapes = {tuple(h.shape) for h in steps}
    if len(shapes) > 1:
        raise SiteError(
            f"module {name!r} is called {len(calls)} times in one forward pass and returns tensors of shapes {sorted(shapes)}, "
            "which are no steps of one activity. Name modules that are called once."
        )
    if not all(h.requires_grad for h in steps):
        raise SiteError(
            f"module {name!r} is called {len(calls)} times in one forward pass, and not all of its outputs depend on a parameter. "
            "Name another module."
        )
    tokens = 1 + trace.tokens(steps[0], calls[0].end)
    point = HookPoint(name, "output", EVERY, leaf if calls[0].structured else None)
    site = Site(name, (point,), (len(steps), *steps[0].shape[1:]), tokens)
    if tokens == source.tokens and site.shape[:tokens] == source.shape[:tokens]:
        _check_order(name, steps, source, made)
    return site


def _check_order(name: str, steps: Sequence[Tensor], source: Source, made: Tensor) -> None:
    """The first step depends on the first call only, and the last step on the last call. A head of zeros shows neither."""
    first, last = _felt(steps, made[:, 0]), _felt(steps, made[:, -1])
    if any(first[1:]) or (any(last) and not last[-1]):
        seen = ", ".join(str(i) for i, felt in enumerate(first) if felt)
        raise AttachError(
            f"the calls of module {name!r} are not the steps of the source {source.name!r} in their order (step 0 depends on calls "
            f"{seen or 'none'}), so a step would get the error of another. Turn the input of a loop that runs backwards round "
            "instead, choose an error_at below what mixes the steps, or name other sites."
        )


def _felt(steps: Sequence[Tensor], step: Tensor) -> list[bool]:
    """Which calls a step of the source depends on."""
    error = torch.randn(step.shape, generator=torch.Generator().manual_seed(0)).to(step)
    total = (step * error).sum()
    grads = torch.autograd.grad(total, steps, retain_graph=True, materialize_grads=True)
    return [bool(grad.any()) for grad in grads]
