"""Joining the ranks that `torchrun` started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from feedbackward.errors import FeedbackError


@contextmanager
def start(timeout: float = 60.0, backend: str | None = None) -> Iterator[int]:
    """Within this context, `torch.distributed` runs among the processes that `torchrun` started; gives
    the number of this one.

    Without torchrun nothing is started, and the number is 0. Unlike `init_process_group` alone, it
    works under `torchrun --max-restarts` with gloo: each attempt has addresses of its own in the
    store. timeout: seconds after which a wait for another process is an error. backend: by default
    nccl where there are CUDA devices, else gloo.

    Raises FeedbackError where the processes do not find each other, or the port is taken.

    Example:
        >>> import feedbackward as fb
        >>> with fb.parallel.start() as rank:  # in a script that torchrun may have started
        ...     print(rank)
        0
    """
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        yield 0
        return
    wait = timedelta(seconds=timeout)
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=wait))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        chosen = backend or ("nccl" if torch.cuda.is_available() else "gloo")
        own = dist.PrefixStore(f"feedbackward/attempt-{attempt}", store)
        dist.init_process_group(chosen, store=own, rank=rank, world_size=size, timeout=wait)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        first = str(error).splitlines()[0]
        raise FeedbackError(
            f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} could not join the others at {where} "
            f"within {timeout:g} s: start as many as were announced, and give torchrun a free --master-port. [{first}]"
        ) from error
    try:
        yield rank
    finally:
        dist.destroy_process_group()
