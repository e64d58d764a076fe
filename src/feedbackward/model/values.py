"""The tensors in what a model returns, whatever its class."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, keystr, tree_flatten_with_path, tree_is_leaf, tree_leaves


def by_place(args: Any, kwargs: Any) -> tuple[dict[str, Any], TreeSpec]:
    """What a call was given, tensors and all else, by argument or keyword and by where it is within that; and its structure.

    The places do not depend on the order of keywords or of a dict's items.
    """
    found, spec = tree_flatten_with_path((args, kwargs))
    return {keystr(path): leaf for path, leaf in found}, spec


def tensors_in(value: Any, deep: bool = False) -> list[Tensor]:
    """The tensors in tuples, lists, dicts and dataclasses, and in the value itself if it is an object with attributes.

    Subclasses of these count as well. Other objects inside it are searched only where `deep`: a cache of keys and values is no
    prediction.
    """
    found: list[Tensor] = []
    seen = set[int]()
    stack = [value]
    while stack:
        for leaf in tree_leaves(stack.pop()):
            if isinstance(leaf, Tensor):
                found.append(leaf)
            elif id(leaf) not in seen and not (deep and callable(leaf)):
                seen.add(id(leaf))
                stack += _parts(leaf, deep or leaf is value)
    return found


def _parts(leaf: Any, whole: bool) -> list[Any]:
    """What is in a value that PyTorch does not look into. Of objects, only the whole output and dataclasses are opened."""
    if isinstance(leaf, Mapping):
        return list(leaf.values())
    if isinstance(leaf, (list, tuple, set, deque)):
        return list(leaf)
    if isinstance(leaf, (type, nn.Module)) or not (whole or dataclasses.is_dataclass(leaf)):
        return []
    return list(attributes(leaf).values())


def tensors_within(value: Any) -> list[Tensor]:
    """All tensors that a value holds, however deep in objects, once each."""
    return list({id(t): t for t in tensors_in(value, deep=True)}.values())


def is_opaque(value: Any) -> bool:
    """Whether the value is an object with attributes that PyTorch does not look into."""
    if isinstance(value, (Tensor, type)) or callable(value) or not tree_is_leaf(value):
        return False
    return bool(attributes(value))


def attributes(value: Any) -> dict[str, Any]:
    """The attributes of an object, from its `__dict__` and its slots."""
    slots = [s for kind in type(value).__mro__ for s in _names(getattr(kind, "__slots__", ()))]
    found = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return {**found, **getattr(value, "__dict__", {})}


def describe_type(value: Any) -> str:
    """The class of a value, with the names of its fields if it has any."""
    kind = type(value).__name__
    if hasattr(value, "keys"):
        fields = list(map(str, value.keys()))
    elif isinstance(value, tuple):
        fields = [f"[{i}]" for i in range(len(value))]
    else:
        fields = list(attributes(value))
    what = f"the dataclass {kind}" if dataclasses.is_dataclass(value) else kind
    return f"{what} with {', '.join(fields)}" if fields else what


def _names(slots: Any) -> list[str]:
    names = (slots,) if isinstance(slots, str) else slots
    return [name for name in names if not name.startswith("__")]
