"""The autograd functions: identities whose backward sends errors, starts local losses, and shares gradients.

`Broadcast` returns a source unchanged, and takes the kept activities and the feedback weights as further inputs. Autograd
itself then gives each activity its teaching signal and each feedback weight its gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from feedbackward.graph import Edge
from feedbackward.operators.base import Operator


class Broadcast(torch.autograd.Function):
    """Identity on a source; its backward sends the source's error along the edges.

    forward(source, edges, target, h_1..h_k, *weights of edge 1, ..., *weights of edge k) -> source. Backward, with
    `d = dLoss/dsource`: `d` for the source, the teaching signal shaped like `h_i` for each activity, and the rule's
    gradient for each learned weight.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        source: Tensor, edges: Sequence[Edge], target: Tensor | None, *tensors: Tensor
    ) -> Tensor:
        return source.detach()  # not a view: an in-place operation may follow

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        source, edges, target, *tensors = inputs
        k = len(edges)
        ctx.edges = edges
        ctx.kinds = [(h.shape, h.dtype) for h in tensors[:k]]
        ctx.kept = any(edge.rule.receives or edge.learns_in_pass for edge in edges)
        activity = source if any(edge.rule.sends_activity for edge in edges) else None
        ctx.save_for_backward(target, activity, *(tensors if ctx.kept else tensors[k:]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        target, activity, *saved = ctx.saved_tensors
        k = len(ctx.edges)
        activities, rest = (saved[:k], saved[k:]) if ctx.kept else ([], saved)
        signals: list[Tensor | None] = []
        grads: list[Tensor | None] = []
        for i, (edge, (shape, dtype)) in enumerate(zip(ctx.edges, ctx.kinds, strict=True)):
            lead, parts = (
                edge.leading + edge.repeats,
                len(edge.operator.parts) + bool(edge.forward_weight),
            )
            weights, rest = tuple(rest[:parts]), rest[parts:]
            error, y, s = (
                None if t is None else _rows(t.to(dtype), edge, shape)
                for t in (d, target, activity)
            )
            message = edge.rule.message(edge, error, y, s)
            signal = None
            if ctx.needs_input_grad[3 + i]:
                cast = tuple(w.to(dtype) if w.is_floating_point() else w for w in weights)
                signal = edge.operator.send(cast, message, tuple(shape[lead:]))
                if edge.rule.receives:
                    h = activities[i].flatten(0, lead - 1)
                    signal = edge.rule.receive(edge, signal.reshape(h.shape), h)
                signal = signal.reshape(shape)
                if edge.factor != 1:
                    signal = edge.factor * signal
            signals.append(signal)
            wanted = ctx.needs_input_grad[3 + k + len(grads) : 3 + k + len(grads) + parts]
            made: Sequence[Tensor] = ()
            if any(wanted):
                made = edge.rule.feedback_grad(
                    edge, weights, message, activities[i].flatten(0, lead - 1)
                )
            grads += [
                made[j].to(w.dtype) if need else None
                for j, (w, need) in enumerate(zip(weights, wanted, strict=True))
            ]
        return (d, None, None, *signals, *grads)


def _rows(t: Tensor, edge: Edge, shape: torch.Size) -> Tensor:
    """What the source has for each row of a site of this shape: `[M, *source]`."""
    if edge.summed:
        t = t.flatten(1, edge.summed).sum(1)
    if edge.repeats:
        t = t.unsqueeze(1).expand(-1, shape[1], *t.shape[1:])
    lead = edge.leading + edge.repeats
    return t if lead == 1 else t.flatten(0, lead - 1)


class Join(torch.autograd.Function):
    """Identity on a source; its backward also starts the backward passes of local losses.

    forward(source, loss_1..loss_k) -> source.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(source: Tensor, *losses: Tensor) -> Tensor:
        return source.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.kinds = [(loss.shape, loss.dtype, loss.device) for loss in inputs[1:]]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, ...]:
        return (
            d,
            *(torch.ones(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.kinds),
        )


class Defer(torch.autograd.Function):
    """Identity whose backward gives what arrived in the sweep before: what `held` holds, or zeros where it is empty."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, held: list[Tensor]) -> Tensor:
        ctx.held = held
        return h.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        before = ctx.held.pop() if ctx.held else torch.zeros_like(grad)
        ctx.held.append(grad)
        return before, None


class Sweep(torch.autograd.Function):
    """Identity on a source whose backward first sends its error, `sweeps` times, down to the deferred tensors.

    forward(source, sweeps, deferred) -> source; `deferred`: each tensor with the list that its :class:`Defer` holds.
    """

    @staticmethod
    def forward(
        ctx: Any, source: Tensor, sweeps: int, deferred: Sequence[tuple[Tensor, list[Tensor]]]
    ) -> Tensor:
        ctx.source, ctx.sweeps, ctx.deferred = source, sweeps, deferred
        return source.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None, None]:
        for _, held in ctx.deferred:
            held.clear()
        ends = [h for h, _ in ctx.deferred]
        for _ in range(ctx.sweeps):
            torch.autograd.grad(ctx.source, ends, d, retain_graph=True, allow_unused=True)
        return d, None, None


class Share(torch.autograd.Function):
    """Identity on `W`; its backward gives `W` its gradient, and `B` what the operator makes of that gradient.

    The gradient is computed once.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(W: Tensor, operator: Operator, *weights: Tensor) -> Tensor:
        return W.view_as(W)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _, ctx.operator, *weights = inputs
        ctx.save_for_backward(*weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights = ctx.saved_tensors
        made = ctx.operator.share(weights, grad)
        return (grad, None, *made, *[None] * (len(weights) - len(made)))


# the classes of these functions' nodes in autograd's graph
BROADCAST, DEFER, JOIN, SHARE = (f._backward_cls for f in (Broadcast, Defer, Join, Share))
