"""Before the first step: do all ranks have the same model, feedback, rule and options?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from feedbackward.errors import AttachError

# words for what differs, and what to do about it
_FIXES = {
    "torch": "install the same version on every host",
    "feedbackward": "install the same version on every host",
    "rule": "give every rank the same rule and options",
    "options": "give every rank the same micro_batches, cut, delay and in_flight",
    "model": "build the same model on every rank",
    "weights": "call torch.manual_seed with one number before the model is built, or load one checkpoint on every rank",
    "feedback": "give attach the same seed on every rank, or load one checkpoint on every rank",
}


def facts(model: nn.Module, feedback: nn.Module, **others: Any) -> dict[str, str]:
    """What all ranks must agree on, each as a short text."""
    from feedbackward import __version__

    shapes = [(name, tuple(t.shape), str(t.dtype)) for name, t in model.state_dict().items()]
    return {
        "torch": torch.__version__,
        "feedbackward": __version__,
        **{name: str(value) for name, value in others.items()},
        "model": f"{type(model).__name__} {hashlib.sha256(repr(shapes).encode()).hexdigest()[:8]}",
        "weights": digest(model.state_dict()),
        "feedback": digest(feedback.state_dict()),
    }


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A short text that differs where one bit of the tensors does."""
    made = hashlib.sha256()
    for name, tensor in tensors.items():
        made.update(name.encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        made.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return made.hexdigest()[:12]


def agree(group: dist.ProcessGroup | None, own: Mapping[str, str]) -> None:
    """Raise AttachError, on every rank, naming the first fact in which ranks differ."""
    if group is None:
        return
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, dict(own), group=group)
    for name in own:
        refuse_different(name, [facts[name] for facts in found])


def refuse_different(name: str, values: Iterable[str]) -> None:
    """Raise AttachError unless all ranks have the same value."""
    holders: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        holders.setdefault(value, []).append(rank)
    if len(holders) > 1:
        told = "; ".join(f"{value} on {_ranks(ranks)}" for value, ranks in holders.items())
        raise AttachError(
            f"the ranks of the pipeline differ in their {name}: {told}. {_FIXES[name].capitalize()}."
        )


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
