"""Preparing the first replay: whether the forward pass can be repeated, and which part need not be."""

from __future__ import annotations

import itertools
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from feedbackward.activity import Source
from feedbackward.engine.attached import Attached
from feedbackward.engine.plan import parameters_behind
from feedbackward.errors import AttachError
from feedbackward.model.example import copied, run
from feedbackward.model.state import preserved
from feedbackward.model.values import tensors_in
from feedbackward.schedules.passes import Fingerprint


@dataclass
class Preparation:
    """What is known of a model's passes before they are replayed.

    `hold`: the number of the site above which everything is trained in the first pass; None to repeat the whole pass.
    `changed`: an attribute that a pass gives another value, which each pass of a segment by itself would do again.
    `separable`: whether the segments have been seen to run by themselves.
    """

    hold: int | None
    changed: str | None
    separable: bool = False


# what was found, by attached model and by what it depends on
_KNOWN: WeakKeyDictionary[Attached, dict[Hashable, Preparation]] = WeakKeyDictionary()


def prepared(attached: Attached, inputs: Any) -> Preparation:
    """The preparation of the model as it is now.

    It is made again when other parameters train, or modules or their modes have changed. Raises AttachError as `prepare`
    does.
    """
    known = _KNOWN.setdefault(attached, {})
    key = (
        # a reference, because a new module may have the id of one that is gone
        tuple((name, ref(m), m.training) for name, m in attached.model.named_modules()),
        tuple(name for name, p in attached.model.named_parameters() if p.requires_grad),
    )
    if key not in known:
        known[key] = prepare(attached, inputs)
    return known[key]


def prepare(attached: Attached, inputs: Any) -> Preparation:
    """Run the forward pass a few times, compare every site's activity, and weigh the segments.

    Raises AttachError, naming the first site that differs, before any gradient is computed.
    """
    first, second = _listen(attached, inputs), _listen(attached, inputs)
    for name, fingerprint in first.fingerprints.items():
        if not fingerprint.like(second.fingerprints.get(name)):
            raise AttachError(
                f"two forward passes with the same inputs and the same random state differ at {name!r}: some randomness does not "
                "come from torch's generators (NumPy, Python objects of its own), or the forward pass depends on what earlier ones "
                'did. Draw it with torch, keep state in buffers, or use schedule="joint".'
            )
    hold = _hold(attached, first.bytes)
    if hold is not None and not _holds(attached, inputs, hold):
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


def _listen(attached: Attached, inputs: Any) -> _Listener:
    tensors = (*attached.model.parameters(), *attached.model.buffers())
    known = {t.untyped_storage()._cdata for t in tensors}
    listener = _Listener([site.name for site in attached.cuts.sites], known)
    saving = torch.autograd.graph.saved_tensors_hooks(listener.save, lambda tensor: tensor)
    with preserved(attached.model) as before, saving, attached.cuts.visiting(listener):
        run(attached.model, copied(inputs))
        listener.changed = before.attributes.changed()
    return listener


def _hold(attached: Attached, weights: dict[int, int]) -> int | None:
    """The lowest site such that all segments above it take no more memory than the largest segment.

    All sources must lie above it. None if there is no such site.
    """
    below = list(itertools.takewhile(lambda item: isinstance(item, int), attached.plan.order))
    met = [index for index in below if isinstance(index, int)]
    rest = [index for index in attached.plan.order if isinstance(index, int) and index not in met]
    above = sum(weights[index] for index in rest)
    largest = max(weights.values())
    hold = None
    for index in reversed(met):
        if above > largest:
            break
        hold, above = index, above + weights[index]
    return hold


def _holds(attached: Attached, inputs: Any, hold: int) -> bool:
    """Whether a pass that records gradients from this site on reaches everything that trains above it."""
    cuts, plan = attached.cuts, attached.plan
    names = {id(p): name for name, p in attached.model.named_parameters()}
    with preserved(attached.model), torch.no_grad(), cuts.recording(hold=hold) as tape:
        output = run(attached.model, copied(inputs))
    torch.clear_autocast_cache()
    ends = [t for t in tensors_in(output) if t.requires_grad]
    lower = plan.order[: plan.order.index(hold) + 1]
    segments = [
        ([h] if h is not None and h.requires_grad else [], segment)
        for i, (h, segment) in enumerate(zip(tape.h, plan.segments, strict=True))
        if i not in lower
    ]
    trainable = {name for name, p in attached.model.named_parameters() if p.requires_grad}
    return all(
        set(parameters_behind(tensors, names)) >= set(segment.parameters) & trainable
        for tensors, segment in [*segments, (ends, plan.head)]
    )
