"""Saving and restoring what a forward pass changes: random numbers, buffers, modes and flags."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from feedbackward.model.attributes import Attributes, copy_back


class RandomState:
    """The state of the random number generators that a forward pass of the module may draw from."""

    def __init__(self, module: nn.Module) -> None:
        tensors = (*module.parameters(), *module.buffers())
        devices = {t.device for t in tensors if t.device.type == "cuda"}
        self.cpu = (random.getstate(), torch.get_rng_state())
        self.numpy = np.random.get_state()
        self.cuda = [(device, torch.cuda.get_rng_state(device)) for device in devices]

    def restore(self) -> None:
        """Put them back."""
        random.setstate(self.cpu[0])
        torch.set_rng_state(self.cpu[1])
        np.random.set_state(self.numpy)
        for device, state in self.cuda:
            torch.cuda.set_rng_state(state, device)


class PassState:
    """What a forward pass may change besides weights: buffers, attributes, and the random number generators.

    Buffers get back their values and sizes; those that the pass created are taken away again.
    """

    def __init__(self, module: nn.Module) -> None:
        self.random = RandomState(module)
        self.attributes = Attributes(module)
        self.modules = [(m, dict(m._buffers)) for m in module.modules()]
        self.values = [
            (b, b.detach().clone())
            for _, buffers in self.modules
            for b in buffers.values()
            if b is not None
        ]

    def restore(self) -> None:
        """Put everything back as it was."""
        self.random.restore()
        for m, buffers in self.modules:
            for name in m._buffers.keys() - buffers.keys():
                delattr(m, name)
            m._buffers.update(buffers)
        self.attributes.restore()
        for buffer, values in self.values:
            copy_back(buffer, values)


class Parts:
    """The modules and parameters that a module consists of; a forward pass may make others."""

    def __init__(self, module: nn.Module) -> None:
        self._parts = [(m, dict(m._parameters), dict(m._modules)) for m in module.modules()]
        self._names = {id(m): name for name, m in module.named_modules()}

    def made(self) -> str | None:
        """The name of a parameter or module that was not there before."""
        for m, parameters, modules in self._parts:
            now: dict[str, object] = {**m._parameters, **m._modules}
            for name, part in now.items():
                if part is not None and {**parameters, **modules}.get(name) is not part:
                    return f"{self._names[id(m)]}.{name}".lstrip(".")
        return None

    def restore(self) -> None:
        """Take away what was made, and put back what was there."""
        for m, parameters, modules in self._parts:
            m._parameters.clear()
            m._parameters.update(parameters)
            m._modules.clear()
            m._modules.update(modules)


@contextmanager
def preserved(module: nn.Module) -> Iterator[PassState]:
    """Restore buffers, attributes and random number generators after a pass nobody asked for, which runs uncompiled."""
    with as_written(module.modules()):
        state = PassState(module)
        try:
            yield state
        finally:
            state.restore()


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into training mode if it is in evaluation mode as a whole; restore it module by module."""
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
    """Let every parameter require a gradient, so that the graph shows everything that depends on parameters."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


@contextmanager
def unchanged_parameters(model: nn.Module) -> Iterator[None]:
    """Parameters that a module changes in its own forward (an initialisation by the first batch) get back their values.

    Each module's own are copied while it runs, so that no more memory is needed than for those of one layer at a time.
    PyTorch's layers leave theirs alone, but for embeddings that renormalise.
    """
    copies: list[list[tuple[Tensor, Tensor]]] = []

    def enter(module: nn.Module, args: object) -> None:
        own = module.parameters(recurse=False)
        copies.append([(p, p.detach().clone()) for p in own if not p.is_meta])

    def leave(module: nn.Module, args: object, output: object) -> None:
        changed.extend(pair for pair in copies.pop() if not torch.equal(*pair))

    changed: list[tuple[Tensor, Tensor]] = []
    with ExitStack() as stack:
        for module in model.modules():
            of_torch = type(module).__module__.startswith("torch.nn.")
            if of_torch and getattr(module, "max_norm", None) is None:
                continue
            if next(module.parameters(recurse=False), None) is not None:
                stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
                stack.callback(module.register_forward_hook(leave).remove)
        try:
            yield
        finally:
            unfinished = [pair for pairs in copies for pair in pairs]
            for p, values in reversed([*changed, *unfinished]):
                p.data.copy_(values)


@contextmanager
def as_written(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Modules that were compiled in place (`module.compile()`) run as they are written."""
    compiled = [(m, m._compiled_call_impl) for m in modules if m._compiled_call_impl is not None]
    for module, _ in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled:
            module._compiled_call_impl = call


@contextmanager
def forward_of(module: nn.Module, stand_in: Callable[..., Any]) -> Iterator[None]:
    """Run `stand_in` in place of the module's forward. A forward that the instance holds is restored afterwards."""
    own = vars(module).get("forward")
    vars(module)["forward"] = stand_in
    try:
        with as_written([module]):
            yield
    finally:
        del vars(module)["forward"]
        if own is not None:
            vars(module)["forward"] = own
