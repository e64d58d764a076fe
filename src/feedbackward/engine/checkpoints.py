"""What a checkpoint (torch.utils.checkpoint) must not throw away."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint

# torch 2.6 and 2.7 do not say whose hooks are in force
_innermost = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
KNOWN = _innermost is not None


def kept_by_checkpoints() -> AbstractContextManager[Any]:
    """A context whose operations keep what they need, also within a checkpoint: they are not repeated in the backward pass."""
    # a compiler decides itself what it repeats
    if torch.compiler.is_compiling() or not _in_checkpoint():
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_same, _same)


def _in_checkpoint() -> bool:
    """Whether the innermost hooks of saved tensors are those of a checkpoint; other hooks (offloading) stay in force."""
    hooks = None if _innermost is None else _innermost(False)
    return hooks is not None and hooks[0].__module__ == checkpoint.__name__


def _same(tensor: Tensor) -> Tensor:
    return tensor
