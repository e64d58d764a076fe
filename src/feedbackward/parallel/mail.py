"""Messages between the ranks of a pipeline: receives are posted ahead, no send is waited for before
the next step, every wait has a timeout and names the rank that it waits for, and bytes are
counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from feedbackward.parallel.arrivals import Arrivals, Awaited
from feedbackward.parallel.faults import lost

Kind = Literal["activation", "error", "gradient", "header", "loss", "evaluated", "output"]
# those that the backward pass needs
BACKWARD: tuple[Kind, ...] = ("error", "gradient")
_NUMBERS = {
    "header": 0,
    "activation": 1,
    "error": 2,
    "gradient": 3,
    "loss": 4,
    "evaluated": 5,
    "output": 6,
}


@dataclass(frozen=True)
class Message:
    """`index`: the micro-batch. `name`: which source's error it is, by number."""

    kind: Kind
    peer: int
    step: int
    index: int = 0
    name: int = 0

    @property
    def tag(self) -> int:
        return ((_NUMBERS[self.kind] * 64 + self.name) * 8 + self.step % 8) * 1024 + self.index

    def __str__(self) -> str:
        return f"{self.kind} of step {self.step}, micro-batch {self.index}"


class Mail:
    """Sends and receives among the ranks of a group.

    `up`, `down`: groups of the same ranks, for what goes to later stages and to earlier ones: where
    the messages of a pair of ranks keep one order (NCCL), the two directions must not wait for
    each other. Attributes: `sent`, `received`: bytes by kind since the beginning.
    """

    def __init__(
        self, up: dist.ProcessGroup | None, down: dist.ProcessGroup | None, timeout: float
    ) -> None:
        self.up, self.down, self.timeout = up, down, timedelta(seconds=timeout)
        self.rank = dist.get_rank(up) if up is not None else 0
        self.size = dist.get_world_size(up) if up is not None else 1
        self.sent: Counter[str] = Counter()
        self.received: Counter[str] = Counter()
        self._arrivals = Arrivals(self.timeout)
        self._expected: dict[Message, tuple[dist.Work | Awaited, Tensor]] = {}
        self._leaving: list[tuple[Message, dist.Work, Tensor]] = []

    def expect(
        self,
        message: Message,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        noticed: bool = False,
    ) -> None:
        """Post the receive of a message. noticed: so that `arrived` says whether it is there."""
        buffer = torch.empty(tuple(shape), dtype=dtype, device=device)
        group = self._group(message.peer < self.rank)
        try:
            work = dist.irecv(buffer, group=group, tag=message.tag, group_src=message.peer)
        except RuntimeError as error:
            raise lost(message.peer, str(message), error) from error
        assert work is not None
        # on other devices, waits are for the device and cost this process nothing
        noticed = noticed and device.type == "cpu"
        self._expected[message] = self._arrivals.notice(work) if noticed else work, buffer

    def arrived(self, message: Message) -> bool:
        """Whether a message that was to be noticed is there; True for the others."""
        work, _ = self._expected[message]
        return work.arrived if isinstance(work, Awaited) else True

    def receive(self, message: Message) -> Tensor:
        """Wait for a message that was expected."""
        work, buffer = self._expected.pop(message)
        self._wait(message, work)
        self.received[message.kind] += buffer.nbytes
        return buffer

    def send(self, message: Message, tensor: Tensor) -> None:
        """Send a tensor, which must not change afterwards, without waiting."""
        tensor = tensor.detach().contiguous()
        group = self._group(message.peer > self.rank)
        try:
            work = dist.isend(tensor, group=group, tag=message.tag, group_dst=message.peer)
        except RuntimeError as error:
            raise lost(message.peer, str(message), error) from error
        assert work is not None
        self.sent[message.kind] += tensor.nbytes
        self._leaving.append((message, work, tensor))

    def settle(self) -> None:
        """Wait until all that was sent has left."""
        leaving, self._leaving = self._leaving, []
        for message, work, _ in leaving:
            self._wait(message, work)

    def _wait(self, message: Message, work: dist.Work | Awaited) -> None:
        try:
            work.wait(self.timeout)
        except RuntimeError as error:
            raise lost(message.peer, str(message), error) from error

    def _group(self, upward: bool) -> dist.ProcessGroup | None:
        return self.up if upward else self.down
