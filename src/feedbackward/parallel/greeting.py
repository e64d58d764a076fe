"""What the ranks tell each other at the beginning of a step: which step it is, of how many rows, from
which data, and whether it is to be the last."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from feedbackward.errors import FeedbackError
from feedbackward.parallel.mail import Mail, Message
from feedbackward.parallel.step import Batch


class Greeting:
    """From each rank to the next, with the activities of the step."""

    def __init__(self, mail: Mail) -> None:
        self.mail = mail

    def exchange(self, batch: Batch, wish: int) -> int:
        """Compare the step with the rank below, and pass on the wish of rank 0, which is returned.

        Raises FeedbackError where the ranks are given different batches.
        """
        mail, number = self.mail, batch.number
        facts = [number, batch.rows, _fingerprint(batch.inputs[0])]
        told = torch.tensor([*facts, wish])
        if mail.rank:
            message = Message("header", mail.rank - 1, number)
            mail.expect(message, told.shape, told.dtype, told.device)
            told = mail.receive(message)
            if told[:3].tolist() != facts:
                raise FeedbackError(_other_batch(mail.rank, facts, told[:3].tolist()))
        if mail.rank < mail.size - 1:
            mail.send(Message("header", mail.rank + 1, number), told)
        return int(told[3])


def _fingerprint(inputs: Any) -> int:
    """A number that differs where the first row of a batch does; 0 on devices that would wait."""
    first = next(t for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.dim())
    if first.device.type != "cpu":
        return 0
    row = first[:1].detach().contiguous().reshape(-1).view(torch.uint8)
    return zlib.crc32(row.numpy().tobytes())


def _other_batch(rank: int, own: list[int], theirs: list[int]) -> str:
    names = ("step", "rows", "fingerprint of the first row")
    told = [
        f"{n} {a} here, {b} there" for n, a, b in zip(names, own, theirs, strict=True) if a != b
    ]
    return (
        f"rank {rank} and rank {rank - 1} of the pipeline are given different batches ({'; '.join(told)}): "
        "seed the loaders of all ranks alike, and give each the same number of batches."
    )
