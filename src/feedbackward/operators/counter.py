"""Random numbers as a function of a key and a count, without a generator: the same on every device and rank."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

Number = TypeVar("Number", int, Tensor)
_MASK = 0xFFFFFFFF


def uniform(state: Tensor, size: int) -> Tensor:
    """`size` numbers in [0, 1), float32, from `state: [2]` (int64): a key and a count, both not negative."""
    key, count = state.unbind()
    stream = _mix(_mix((key & _MASK) ^ _mix(count & _MASK)) ^ (key >> 32))
    index = torch.arange(size, device=state.device)
    return (_mix(_mix(index) ^ stream) >> 8).float() * 2.0**-24


def words(key: int, start: int, stop: int, device: torch.device | None) -> Tensor:
    """The numbers `start` to `stop` of a key's sequence, 32 random bits each, in int64. `key`: from 0 to 2**63."""
    stream = _mix(_mix(key & _MASK) ^ (key >> 32))
    index = torch.arange(start, stop, device=device)
    return _mix(_mix(index & _MASK) ^ (index >> 32) ^ stream)


def new_state(generator: torch.Generator) -> Tensor:
    """A key drawn from the generator, and the count 0."""
    return torch.cat(
        [torch.randint(2**62, (1,), generator=generator), torch.zeros(1, dtype=torch.int64)]
    )


def _mix(x: Number) -> Number:
    """A bijection of 32 bits in which every bit of the result depends on every bit of `x`.

    Its multipliers are odd and below 2**31, so no product needs more than 63 bits.
    """
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _MASK
    return x ^ (x >> 15)
