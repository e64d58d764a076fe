"""What a run is tied to: its classes, images, labels and their order. Kept in the checkpoint and in data.json."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from feedbackward.errors import CheckpointError
from feedbackward.experiment.tasks import AnyData

SPLITS = ("train", "validation", "test")
_IN_WORDS = ("input", "note")


def data_identity(data: AnyData) -> dict[str, Any]:
    """What tells this data set from another one or a changed one, and what a model needs to be used elsewhere.

    `classes` are in the order of the outputs. A digest sees everything in a split, in order.
    """
    return {
        "name": data.name,
        "classes": list(data.classes),
        "images": {split: len(getattr(data, split)) for split in SPLITS},
        "digests": dict(data.digests),
        **data.form,
        "note": data.note,
    }


def check_same_data(
    found: Any, data: AnyData, where: str | os.PathLike[str], again: str = "start another run"
) -> None:
    """Refuse what was trained on other data, naming the first difference.

    Args:
        found: the identity that the checkpoint or data.json holds.
        data: the data set as it is now.
        where: what to call the holder in the message.
        again: what to do instead of going on.
    """
    if not isinstance(found, Mapping) or "digests" not in found:
        raise CheckpointError(
            f"{where} does not say which classes and images it was trained on, as checkpoints of feedbackward 0.1.0 do "
            f"not: {again}"
        )
    here = data_identity(data)
    for key, value in here.items():
        if key not in _IN_WORDS and found.get(key) != value:
            raise CheckpointError(
                f"{where} was trained on other data: {_difference(key, found.get(key), value)}; "
                f"resume it with the data it had, or {again}"
            )


def _difference(key: str, there: Any, here: Any) -> str:
    if key == "classes" and isinstance(there, list):
        return _classes(there, here)
    if key in ("images", "digests") and isinstance(there, Mapping):
        split = next(s for s in (*SPLITS, *there) if there.get(s) != here.get(s))
        if key == "images":
            return f"there were {there.get(split)} {split} images, now there are {here.get(split)}"
        return f"the {split} images, their labels or their order have changed, though there are as many"
    return f"its {key} is {there}, here it is {here}"


def _classes(there: list[Any], here: list[str]) -> str:
    if len(there) != len(here):
        missing = [str(name) for name in there if name not in here]
        new = [name for name in here if name not in there]
        gone = f", without {', '.join(missing[:3])}" if missing else ""
        more = f", with {', '.join(new[:3])}" if new else ""
        return f"it had {len(there)} classes, here there are {len(here)}{more}{gone}"
    first = next(i for i, (a, b) in enumerate(zip(there, here, strict=True)) if a != b)
    return f"its class {first} was '{there[first]}', here it is '{here[first]}'"
