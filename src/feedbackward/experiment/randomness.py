"""The global random generators: seeding them, and their state in a checkpoint."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """PyTorch's generators, and Python's and NumPy's in case the user's net draws from them."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def random_state() -> dict[str, Any]:
    """The state of PyTorch's, Python's and NumPy's generators, for a checkpoint."""
    kind, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Set what `random_state` gave; CUDA's only where there are as many devices as then."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))


@contextmanager
def random_numbers_of(seed: int) -> Iterator[None]:
    """Random numbers of this seed within; after it the generators go on as if nothing had been drawn."""
    before = random_state()
    try:
        seed_everything(seed)
        yield
    finally:
        restore_random_state(before)
