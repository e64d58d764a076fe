"""The stage under PyTorch's pipeline schedules; the only file that imports them.

A schedule says in which order a rank works. The messages are posted and sent by the `Worker`, so
the schedule is told that there are none.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from feedbackward.errors import AttachError

try:
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
except ImportError:  # a build of torch without torch.distributed
    PipelineStage = object  # type: ignore[assignment, misc]

# the releases on which the tests run
SUPPORTED = ("2.13",)

Order = Literal["forwards first", "one forward one backward"]


class Worker(Protocol):
    """What a rank does with a micro-batch."""

    def forward(self, index: int) -> Any:
        """The forward pass, from the wait for its input to the sending of its output."""

    def due_before(self, index: int) -> int | None:
        """The micro-batch whose backward may run now, while the input of this one is on its way."""

    def has_ended(self, index: int) -> bool:
        """Whether the backward of a micro-batch has been run before its turn."""

    def tensors_for_backward(self, index: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Wait for the errors; the tensors at which the backward begins, their gradients, and the
        inputs whose gradients are wanted."""

    def after_backward(self, index: int, grads: tuple[Tensor | None, ...]) -> None:
        """Send what the stage below waits for."""


class Stage(PipelineStage):
    """One stage, whose work and messages are a `Worker`'s."""

    def __init__(
        self,
        module: nn.Module,
        worker: Worker,
        place: tuple[int, int],
        device: torch.device,
        group: dist.ProcessGroup,
    ) -> None:
        nothing = torch.empty(0, device=device)
        # with these, the schedule runs no forward pass of its own to learn shapes
        super().__init__(
            module, *place, device, input_args=nothing, output_args=nothing, group=group
        )
        self._worker = worker

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[Any]:
        return []

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[Any]:
        return []

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[Any]:
        return []

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[Any]:
        return []

    def forward_one_chunk(
        self,
        fwd_chunk_id: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        save_forward_output: bool = True,
    ) -> Any:
        while (due := self._worker.due_before(fwd_chunk_id)) is not None:
            self._backward(due, last=False)
        return self._worker.forward(fwd_chunk_id)

    def backward_one_chunk(
        self,
        bwd_chunk_id: int,
        loss: Any = None,
        full_backward: bool = True,
        last_backward: bool = False,
    ) -> None:
        if not self._worker.has_ended(bwd_chunk_id):
            self._backward(bwd_chunk_id, last_backward)

    def _backward(self, index: int, last: bool) -> None:
        tensors, grads, inputs = self._worker.tensors_for_backward(index)
        found: tuple[Tensor | None, ...] = ()
        if tensors:
            wanted = {"stage_output": tensors, "output_grads": grads, "input_values": inputs}
            found, _ = self.backward_maybe_with_nosync("full", wanted, last)
        self._worker.after_backward(index, found)


def run_step(stage: Stage, schedules: dict[Any, Any], micro_batches: int, order: Order) -> None:
    """One step of a rank. `schedules`: those made before, by number of micro-batches."""
    if order == "one forward one backward" and micro_batches < stage.num_stages:
        order = "forwards first"  # the other one needs as many micro-batches as stages
    key = order, micro_batches
    if key not in schedules:
        kind = ScheduleGPipe if order == "forwards first" else Schedule1F1B
        schedules[key] = kind(stage, micro_batches, loss_fn=_done, scale_grads=False)
    # one target for every micro-batch, so that the last stage asks for its loss
    targets = torch.zeros(micro_batches) if stage.is_last else None
    schedules[key].step(target=targets, return_outputs=False)


def _done(output: Any, target: Any) -> Any:
    return output


def refuse_version() -> None:
    """Refuse releases of torch whose pipeline schedules the tests have not run with."""
    if not dist.is_available():
        raise AttachError("this build of torch has no torch.distributed: install one that has.")
    if not torch.__version__.startswith(tuple(f"{version}." for version in SUPPORTED)):
        raise AttachError(
            f"fb.parallel has been tested with torch {' and '.join(SUPPORTED)} only, whose pipeline schedules it uses, and "
            f"this is {torch.__version__}: install torch=={SUPPORTED[-1]}.*, or use DistributedDataParallel."
        )
