"""What other tools do with a learner: they shard it, record it, or run it on several processes."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx import _symbolic_trace
from torch.utils._pytree import tree_leaves

from feedbackward.errors import AttachError, FeedbackError


def is_fsdp(module: nn.Module) -> bool:
    """Whether `fully_shard` or `FullyShardedDataParallel` has this module in its care."""
    # importing FSDP takes seconds, and who uses it has imported it
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kinds = () if fsdp is None else (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)
    return isinstance(module, kinds)


def holds_fsdp(model: nn.Module) -> bool:
    """Whether some part of the model is sharded by FSDP."""
    known = "torch.distributed.fsdp" in sys.modules
    return known and any(is_fsdp(module) for module in model.modules())


def refuse_left_out(learner: nn.Module, model: nn.Module, feedback: nn.Module) -> None:
    """Refuse a learner whose model is sharded, but not itself: nobody would reduce the gradients of its feedback."""
    if not holds_fsdp(model) or is_fsdp(learner) or is_fsdp(feedback):
        return
    if any(p.requires_grad for p in feedback.parameters()):
        raise FeedbackError(
            "the model is sharded and the learner is not, so the feedback's gradients would not be reduced over the processes: "
            "call `fully_shard(learner)` after its blocks were sharded."
        )


def is_shard(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor, of which this process holds a part."""
    return hasattr(tensor, "device_mesh")


def refuse_shards(parameters: Iterable[Tensor], why: str) -> None:
    """Refuse what needs whole parameters where this process holds a part of them."""
    if any(is_shard(p) for p in parameters):
        raise FeedbackError(
            f"this process holds parts of the parameters only (DTensor), but {why}."
        )


def is_recorded(training: bool) -> bool:
    """Whether a tool records this pass (torch.export, torch.jit.trace): it gets the plain model.

    Raises FeedbackError in training mode: what was recorded would train by backprop, or not at all.
    """
    exporting: Any = getattr(torch.compiler, "is_exporting", lambda: False)
    fx_traces: Any = getattr(_symbolic_trace, "is_fx_symbolic_tracing", lambda: False)
    if not (exporting() or torch.jit.is_tracing() or fx_traces()):
        return False
    if training:
        raise FeedbackError(
            "a training pass of a learner cannot be recorded by torch.export, torch.jit.trace, torch.fx or "
            "torch.distributed.pipelining: the cuts and the feedback would be lost. To use the trained network, record it in "
            "evaluation mode (`learner.eval()`, or `learner.detach()`); to train in stages on several processes, use "
            "`fb.parallel.pipeline(learner, x)`; to compile the training step, use `torch.compile(learner)`."
        )
    return True


def refuse_transforms(inputs: Any, why: str) -> None:
    """Refuse a pass in forward-mode differentiation, which does not see the feedback, and in torch.func where `why` says so."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    dual = forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(t).tangent is not None
        for t in tree_leaves(inputs)
        if isinstance(t, Tensor)
    )
    if dual or any(level.key().name == "Jvp" for level in stack):
        raise FeedbackError(
            "forward-mode derivatives (torch.func.jvp, jacfwd, linearize) do not see what a learner sends in backward: use "
            "torch.func.grad, vjp or jacrev, or `with learner.exact():` for true derivatives."
        )
    if stack and why:
        raise FeedbackError(
            f"torch.func does not work with {why}: call `loss.backward()` or torch.autograd.grad on the output of `learner(x)`, "
            "or use `with learner.exact():` for true derivatives."
        )


def in_group() -> bool:
    """Whether torch.distributed has begun, be it with one process."""
    return dist.is_available() and dist.is_initialized()


def several_processes() -> bool:
    """Whether this process is one of several that know each other."""
    return in_group() and dist.get_world_size() > 1


def check_reduce(reduce: bool | None, parameters: Iterable[nn.Parameter]) -> bool:
    """Whether `learner.backward` averages gradients over the processes.

    Raises AttachError where nobody said so and it matters, and where gradients are gone when it would.
    """
    if not several_processes():
        return False
    if reduce is None:
        raise AttachError(
            "learner.backward runs inside DistributedDataParallel's or FSDP's module, where these do not average its gradients "
            "over the processes. Say what you want: `learner.backward(..., reduce=True)` averages them, and with "
            "`reduce=False` each process keeps its own; or call `loss.backward()` on the output of the wrapped learner."
        )
    if reduce and any(getattr(p, "_post_accumulate_grad_hooks", None) for p in parameters):
        raise AttachError(
            "reduce=True averages gradients after the backward pass, when fb.step_in_backward has used them: leave one out."
        )
    return reduce


def average_in_backward(parameters: Iterable[nn.Parameter]) -> None:
    """From now on, average each gradient over the processes as soon as a backward pass has added to it.

    What was there before was averaged already, so the sum stays right when batches are accumulated.
    """
    for p in parameters:
        if p.requires_grad and not hasattr(p, "_averaged"):
            # a copy of the parameter has neither the mark nor the hook
            p._averaged = p.register_post_accumulate_grad_hook(_mean)  # type: ignore[attr-defined]


def _mean(p: Tensor) -> None:
    if p.grad is not None and several_processes():
        p.grad = p.grad.contiguous()
        dist.all_reduce(p.grad)
        p.grad /= dist.get_world_size()


@contextmanager
def averaged(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Average the gradients that are made within this context over all processes; add them to those there were."""
    before = {p: p.grad for p in parameters if p.requires_grad}
    for p in before:
        p.grad = None
    try:
        yield
        _average(list(before))
    finally:
        for p, grad in before.items():
            if grad is not None:
                p.grad = grad if p.grad is None else grad + p.grad


def _average(parameters: list[nn.Parameter]) -> None:
    """A process without a gradient counts as zero, where another has one."""
    if not parameters:
        return
    have = torch.tensor([float(p.grad is not None) for p in parameters])
    have = have.to(parameters[0].device)
    dist.all_reduce(have)
    for p, some in zip(parameters, have.tolist(), strict=True):
        if some:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            _mean(p)
