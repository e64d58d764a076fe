"""Preparing the first replay: whether the forward pass can be repeated, and which part need not be."""

from __future__ import annotations

import itertools
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from feedbackward.engine.plan import parameters_behind
from feedbackward.errors import AttachError
from feedbackward.graph import Source
from feedbackward.model.example import copied, run
from feedbackward.model.state import preserved
from feedbackward.model.values import tensors_in
from feedbackward.schedules.passes import Fingerprint

if TYPE_CHECKING:
    from feedbackward.learner import Learner


@dataclass
class Preparation:
    """What is known of a learner's passes before they are replayed.

    `hold`: the number of the site above which everything is trained in the first pass; None to repeat the whole pass.
    `changed`: an attribute that a pass gives another value, which each pass of a segment by itself would do again.
    `separable`: whether the segments have been seen to run by themselves.
    """

    hold: int | None
    changed: str | None
    separable: bool = False


# what was found, by learner and by what it depends on
_KNOWN: WeakKeyDictionary[nn.Module, dict[Hashable, Preparation]] = WeakKeyDictionary()


def prepared(learner: Learner, inputs: Any) -> Preparation:
    """The preparation of the model as it is now.

    It is made again when other parameters train, or modules or their modes have changed. Raises AttachError as `prepare`
    does.
    """
    known = _KNOWN.setdefault(learner, {})
    key = (
        # a reference, because a new module may have the id of one that is gone
        tuple((name, ref(m), m.training) for name, m in learner.model.named_modules()),
        tuple(name for name, p in learner.model.named_parameters() if p.requires_grad),
    )
    if key not in known:
        known[key] = prepare(learner, inputs)
    return known[key]


def prepare(learner: Learner, inputs: Any) -> Preparation:
    """Run the forward pass a few times, compare every site's activity, and weigh the segments.

    Raises AttachError, naming the first site that differs, before any gradient is computed.
    """
    first, second = _listen(learner, inputs), _listen(learner, inputs)
    for name, fingerprint in first.fingerprints.items():
        if not fingerprint.like(second.fingerprints.get(name)):
            raise AttachError(
                f"two forward passes with the same inputs and the same random state differ at {name!r}: some randomness does not "
                "come from torch's generators (NumPy, Python objects of its own), or the forward pass depends on what earlier ones "
                'did. Draw it with torch, keep state in buffers, or use schedule="joint".'
            )
    hold = _hold(learner, first.bytes)
    if hold is not None and not _holds(learner, inputs, hold):
        hold = None
    return Preparation(hold, first.changed)


class _Listener:
    """A visitor that takes every activity's fingerprint, and counts what autograd saves for each segment."""

    def __init__(self, names: list[str], known: set[int]) -> None:
        self.names, self.known = names, known
        self.fingerprints: dict[str, Fingerprint] = {}
        self.bytes: dict[int, int] = {}
        self.changed: str | None = None
        self._seen: dict[int, int] = {}

    def at_site(self, index: int, h: Tensor, version: int) -> None:
        self.fingerprints[self.names[index]] = Fingerprint.of(h)
        self.bytes[index] = sum(self._seen.values()) + h.nbytes
        self._seen = {}

    def at_source(self, source: Source, tensor: Tensor) -> Tensor:
        self.fingerprints[source.name] = Fingerprint.of(tensor)
        return tensor

    def save(self, tensor: Tensor) -> Tensor:
        """Called for every tensor that autograd saves."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self._seen[storage._cdata] = storage.nbytes()
        return tensor


def _listen(learner: Learner, inputs: Any) -> _Listener:
    tensors = (*learner.model.parameters(), *learner.model.buffers())
    known = {t.untyped_storage()._cdata for t in tensors}
    listener = _Listener([site.name for site in learner.cuts.sites], known)
    saving = torch.autograd.graph.saved_tensors_hooks(listener.save, lambda tensor: tensor)
    with preserved(learner.model) as before, saving, learner.cuts.visiting(listener):
        run(learner.model, copied(inputs))
        listener.changed = before.attributes.changed()
    return listener


def _hold(learner: Learner, weights: dict[int, int]) -> int | None:
    """The lowest site such that all segments above it take no more memory than the largest segment.

    All sources must lie above it. None if there is no such site.
    """
    below = list(itertools.takewhile(lambda item: isinstance(item, int), learner.plan.order))
    met = [index for index in below if isinstance(index, int)]
    rest = [index for index in learner.plan.order if isinstance(index, int) and index not in met]
    above = sum(weights[index] for index in rest)
    largest = max(weights.values())
    hold = None
    for index in reversed(met):
        if above > largest:
            break
        hold, above = index, above + weights[index]
    return hold


def _holds(learner: Learner, inputs: Any, hold: int) -> bool:
    """Whether a pass that records gradients from this site on reaches everything that trains above it."""
    cuts, plan = learner.cuts, learner.plan
    names = {id(p): name for name, p in learner.model.named_parameters()}
    with preserved(learner.model), torch.no_grad(), cuts.recording(hold=hold) as tape:
        output = run(learner.model, copied(inputs))
    torch.clear_autocast_cache()
    ends = [t for t in tensors_in(output) if t.requires_grad]
    lower = plan.order[: plan.order.index(hold) + 1]
    segments = [
        ([h] if h is not None and h.requires_grad else [], segment)
        for i, (h, segment) in enumerate(zip(tape.h, plan.segments, strict=True))
        if i not in lower
    ]
    trainable = {name for name, p in learner.model.named_parameters() if p.requires_grad}
    return all(
        set(parameters_behind(tensors, names)) >= set(segment.parameters) & trainable
        for tensors, segment in [*segments, (ends, plan.head)]
    )
