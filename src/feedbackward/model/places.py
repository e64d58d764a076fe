"""Where tensors of a recorded pass can be hooked: the outputs of modules, and modules by their names."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from feedbackward.activity import HookPoint, Site
from feedbackward.errors import AttachError, SiteError
from feedbackward.model.autograd_graph import flattened_from
from feedbackward.model.trace import Call, Trace


def output_place(kind: type, trace: Trace, call: Call, leaf: int) -> Any:
    """One tensor of what a call returned. It has the module's name, and a number unless it is the first tensor."""
    # a module may be called "output"
    whole = "output" if "output" not in trace.counts else "the model's output"
    name = (call.name or whole) + (f"[{leaf}]" if leaf and kind is Site else "")
    point = HookPoint(call.name, "output", 0, leaf if call.structured else None)
    return activity_place(kind, trace, name, (point,), call.outputs[leaf][0], call.end)


def activity_place(
    kind: type, trace: Trace, name: str, points: tuple[HookPoint, ...], tensor: Tensor, when: int
) -> Any:
    tokens = trace.tokens(tensor, when)
    if tokens and tensor.shape[0] in tensor.shape[1 : 1 + tokens] and _sequence_first(trace):
        raise AttachError(
            f"{name!r} has shape {list(tensor.shape)}: with equal batch and token counts it cannot be told whether the "
            "batch comes first. Attach with an example whose batch size differs from its sequence length."
        )
    return kind(name, points, tuple(tensor.shape[1:]), tokens, flattened_from(tensor))


def _sequence_first(trace: Trace) -> bool:
    return any(getattr(call.module, "batch_first", True) is False for call in trace.calls)


def known_modules(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The names, each checked to be a module of the model."""
    modules = dict(model.named_modules())
    for name in names:
        if not isinstance(name, str) or not name or name not in modules:
            near = difflib.get_close_matches(str(name), [m for m in modules if m], n=3, cutoff=0.4)
            hint = (
                f"nearest names: {', '.join(near)}"
                if near
                else f"its modules are {', '.join(list(modules)[1:9])}, ..."
            )
            kinds = ' (or "layers", "every-2", "stages", "blocks")' if len(names) == 1 else ""
            raise SiteError(f"the model has no module named {name!r}; {hint}{kinds}.")
    return list(dict.fromkeys(names))


def called_once(trace: Trace, name: str) -> Call:
    calls = [c for c in trace.calls if c.name == name]
    if len(calls) != 1:
        what = (
            f"is called {len(calls)} times in one forward pass"
            if calls
            else "is not called in the forward pass"
        )
        raise SiteError(
            f"module {name!r} {what}, so its output is not one site. Name a module that is called once."
        )
    return calls[0]


def float_leaf(call: Call) -> int:
    for leaf, (tensor, _) in enumerate(call.outputs):
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            return leaf
    raise SiteError(
        f"module {call.name!r} returns no floating-point tensor, so it cannot be a site or a source."
    )
