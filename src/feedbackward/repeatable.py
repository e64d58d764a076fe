"""Whether a model's forward pass can be repeated: the same inputs and random state give the same activities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import AttachError
from .graph import Source
from .trace import preserved, run

if TYPE_CHECKING:
    from .learner import Learner

_PLAIN = (bool, int, float, str, bytes, type(None))


def refuse_unrepeatable(learner: Learner, inputs: Any) -> None:
    """Run the forward pass twice, once in a learner's life, and compare every site's activity.

    Raises AttachError, naming the first site that differs or the attribute that a pass changed, before any gradient is
    computed.
    """
    if learner.repeatable:
        return
    before = _attributes(learner.model)
    first, second = _marks(learner, inputs), _marks(learner, inputs)
    changed = [key for key, value in _attributes(learner.model).items() if before.get(key, value) != value]
    if changed:
        module, name = changed[0]
        raise AttachError(
            f"the forward pass changes {name!r} of {module or 'the model'!r}, so a replayed step would change it twice: keep such "
            'state in buffers, which are restored, or use schedule="joint".'
        )
    for name, mark in first.items():
        if not _same(mark, second.get(name)):
            raise AttachError(
                f"two forward passes with the same inputs and the same random state differ at {name!r}: some randomness does not "
                "come from torch's generators (NumPy, Python objects of its own), or the forward pass depends on what earlier ones "
                'did. Draw it with torch, keep state in buffers, or use schedule="joint".'
            )
    learner.repeatable = True


class _Marks:
    """A sweep that remembers a few numbers of every activity, and trains nothing."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.found: dict[str, tuple[Any, ...]] = {}

    def met(self, index: int, h: Tensor, version: int) -> None:
        self.found[self.names[index]] = _mark(h)

    def fired(self, source: Source, tensor: Tensor) -> Tensor:
        self.found[source.name] = _mark(tensor)
        return tensor


def _mark(h: Tensor) -> tuple[Any, ...]:
    weights = torch.linspace(0.5, 1.5, h.shape[-1] if h.dim() else 1, device=h.device)
    return tuple(h.shape), h.float().abs().mean().item(), (h.float() * weights).mean().item()


def _marks(learner: Learner, inputs: Any) -> dict[str, tuple[Any, ...]]:
    marks = _Marks([site.name for site in learner.seams.sites])
    with preserved(learner.model), torch.no_grad(), learner.seams.sweeping(marks):
        run(learner.model, inputs)
    torch.clear_autocast_cache()
    return marks.found


def _same(first: tuple[Any, ...], second: tuple[Any, ...] | None) -> bool:
    """Up to the rounding of kernels that add in any order."""
    if second is None or first[0] != second[0]:
        return False
    return all(
        abs(a - b) <= 1e-5 * max(1e-6, abs(first[1])) or a != a
        for a, b in zip(first[1:], second[1:], strict=True)
    )


def _attributes(model: nn.Module) -> dict[tuple[str, str], Any]:
    """The plain values that modules hold."""
    return {
        (name, key): value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, _PLAIN)
    }
