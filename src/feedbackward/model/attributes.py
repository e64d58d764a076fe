"""What modules and the objects that they hold keep besides parameters and buffers, noted before a pass and put back after."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PLAIN = (bool, int, float, str, bytes, complex, type(None), torch.dtype, torch.device, torch.Size)
# how many objects within objects are looked into, and how long a container may be: a module may hold its trainer
_DEPTH, _LENGTH = 2, 1000
# what PyTorch itself keeps in a module: parts, hooks and the like
_OWN = frozenset(vars(nn.Module())) - {"training"}


class Attributes:
    """The attributes of all parts of a module: numbers, tensors, containers, generators, and objects that hold such.

    An attribute gets back its former value, a container its former items, a tensor its former numbers. Modules that are no
    parts, and the objects of PyTorch itself (optimizers, loaders), are left alone.
    """

    def __init__(self, module: nn.Module) -> None:
        self._spaces: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
        self._items: list[tuple[str, Any, Any]] = []
        self._tensors: list[tuple[str, Tensor, int, Tensor]] = []
        self._others: list[Callable[[], object]] = []
        self._seen = {id(t) for t in (*module.parameters(), *module.buffers())}
        for name, part in module.named_modules():
            held = {key: value for key, value in vars(part).items() if key not in _OWN}
            self._spaces.append((name, vars(part), held))
            for key, value in held.items():
                if not isinstance(value, PLAIN):
                    self._note(f"{name}.{key}".lstrip("."), value, _DEPTH)
        self._seen.clear()

    def changed(self) -> str | None:
        """The name of an attribute that is not as it was; None where all are."""
        for name, space, held in self._spaces:
            now = _held(space)
            for key in (*held, *now):
                if now.get(key, _MISSING) is not held.get(key, _MISSING):
                    return f"{name}.{key}".lstrip(".")
        for name, container, items in self._items:
            if not _same(container, items):
                return name
        return next((name for name, t, version, _ in self._tensors if t._version != version), None)

    def restore(self) -> None:
        """Put everything back as it was."""
        for _, space, held in self._spaces:
            for key in _held(space).keys() - held.keys():
                del space[key]
            space.update(held)
        for _, container, items in self._items:
            if not _same(container, items):
                _refill(container, items)
        for _, tensor, version, values in self._tensors:
            if tensor._version != version:
                copy_back(tensor, values)
        for put_back in self._others:
            put_back()

    def _note(self, name: str, value: Any, depth: int) -> None:
        if isinstance(value, PLAIN) or id(value) in self._seen:
            return
        self._seen.add(id(value))
        put_back = _generator(value)
        if put_back is not None:
            self._others.append(put_back)
        elif isinstance(value, Tensor):
            # one that autograd made is not changed in place, but replaced
            if value.grad_fn is None and not value.is_meta and value.layout == torch.strided:
                self._tensors.append((name, value, value._version, value.detach().clone()))
        elif isinstance(value, (list, dict, set, deque)):
            self._items.append((name, value, _copy(value)))
            self._note_all(name, _values(value), len(value), depth)
        elif isinstance(value, tuple):
            self._note_all(name, value, len(value), depth)
        elif depth and _opened(value):
            held = dict(value.__dict__)
            self._spaces.append((name, value.__dict__, held))
            self._note_all(name, held.values(), len(held), depth - 1)

    def _note_all(self, name: str, values: Iterable[Any], length: int, depth: int) -> None:
        if length <= _LENGTH:
            for value in values:
                self._note(name, value, depth)


_MISSING = object()


def copy_back(tensor: Tensor, values: Tensor) -> None:
    """Give a tensor the values and the size that it had, unnoticed by autograd: a backward pass that is still to come may
    hold it."""
    if tensor.shape != values.shape:
        # `.data` is another tensor, whose size is its own
        with torch.no_grad():
            tensor.resize_(values.shape)
    tensor.data.copy_(values)


def _opened(value: Any) -> bool:
    """Whether the attributes of an object are noted as well."""
    if isinstance(value, (nn.Module, type, ModuleType)) or not getattr(value, "__dict__", None):
        return False
    return type(value).__module__.partition(".")[0] != "torch"


def _held(space: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in space.items() if key not in _OWN}


def _values(container: Any) -> Iterator[Any]:
    yield from container.values() if isinstance(container, dict) else container


def _copy(container: Any) -> Any:
    return dict(container) if isinstance(container, dict) else list(container)


def _same(container: Any, items: Any) -> bool:
    """Whether a container holds the very same items, in the same order."""
    if len(container) != len(items):
        return False
    if isinstance(container, dict):
        pairs = zip(container.items(), items.items(), strict=True)
        return all(a is c and b is d for (a, b), (c, d) in pairs)
    return all(a is b for a, b in zip(container, items, strict=True))


def _refill(container: Any, items: Any) -> None:
    container.clear()
    if isinstance(container, (dict, set)):
        container.update(items)
    else:
        container.extend(items)


def _generator(value: Any) -> Callable[[], object] | None:
    """For what draws random numbers, or an array: a function that puts back its state."""
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return lambda: value.set_state(state)
    if isinstance(value, random.Random):
        python = value.getstate()
        return lambda: value.setstate(python)
    if isinstance(value, np.random.RandomState):
        legacy = value.get_state()
        return lambda: value.set_state(legacy)
    if isinstance(value, np.random.Generator):
        bits, numbers = value.bit_generator, value.bit_generator.state
        return lambda: setattr(bits, "state", numbers)
    if isinstance(value, np.ndarray) and value.flags.writeable:
        before = value.copy()
        return lambda: np.copyto(value, before)
    return None
