"""What a forward pass changes, saved and put back: random numbers, buffers, modes, flags."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class RandomState:
    """The state of the random number generators that a forward pass of the module may draw from."""

    def __init__(self, module: nn.Module) -> None:
        tensors = (*module.parameters(), *module.buffers())
        devices = {t.device for t in tensors if t.device.type == "cuda"}
        self.cpu = (random.getstate(), torch.get_rng_state())
        self.cuda = [(device, torch.cuda.get_rng_state(device)) for device in devices]

    def restore(self) -> None:
        """Put them back."""
        random.setstate(self.cpu[0])
        torch.set_rng_state(self.cpu[1])
        for device, state in self.cuda:
            torch.cuda.set_rng_state(state, device)


class PassState:
    """What a forward pass may change besides weights: a module's buffers, and the random number generators.

    Buffers get back their values and sizes. Where a pass created buffers, they are taken away again, and the plain
    attributes of all modules, which may say that they are there, are put back.
    """

    def __init__(self, module: nn.Module) -> None:
        self.random = RandomState(module)
        self.modules = [(m, dict(m._buffers), _plain(m)) for m in module.modules()]
        self.values = [
            (b, b.detach().clone())
            for _, buffers, _ in self.modules
            for b in buffers.values()
            if b is not None
        ]

    def restore(self) -> None:
        """Put everything back as it was."""
        self.random.restore()
        created = False
        for m, buffers, _ in self.modules:
            created |= any(
                buffers.get(name) is None for name, b in m._buffers.items() if b is not None
            )
            for name in m._buffers.keys() - buffers.keys():
                delattr(m, name)
            m._buffers.update(buffers)
        if created:  # any module may have noted that the buffer is there
            for m, _, plain in self.modules:
                for name in _plain(m).keys() - plain.keys():
                    del m.__dict__[name]
                m.__dict__.update(plain)
        for buffer, values in self.values:
            # .data: a backward pass that is still to come may hold this buffer
            if buffer.shape != values.shape:
                # `.data` is another tensor, whose size is its own
                with torch.no_grad():
                    buffer.resize_(values.shape)
            buffer.data.copy_(values)


def _plain(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that are numbers, texts, tensors and the like."""
    kinds = (bool, int, float, str, type(None), Tensor)
    return {name: value for name, value in module.__dict__.items() if isinstance(value, kinds)}


@contextmanager
def preserved(module: nn.Module) -> Iterator[None]:
    """Restore buffers and random number generators after a pass nobody asked for."""
    state = PassState(module)
    try:
        yield
    finally:
        state.restore()


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Training mode, where the model is in evaluation mode as a whole; restored module by module."""
    modes = [(m, m.training) for m in model.modules()]
    if not model.training:
        model.train()
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode


@contextmanager
def all_trainable(model: nn.Module) -> Iterator[None]:
    """Every parameter requires a gradient, so that the graph shows what depends on parameters at all."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
