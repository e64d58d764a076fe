"""What a run is tied to: its data, its settings and its network. Kept in the checkpoint, and the data in data.json."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from feedbackward.errors import CheckpointError, ConfigError
from feedbackward.experiment.config.files import differences, from_dict, to_dict
from feedbackward.experiment.config.schema import TrainConfig
from feedbackward.experiment.data.digest import SPLITS
from feedbackward.experiment.data.folders import printable
from feedbackward.experiment.tasks import AnyData

# a folder may have been moved or renamed
_IN_WORDS = ("input", "note", "name")
# may change when a run is resumed: they say where and how fast it runs, not what it computes
FREE = {
    "out",
    "device",
    "threads",
    "tensorboard",
    "logger",
    "compile",
    "channels_last",
    "data.name",
    "data.root",
}
FREE |= {"parallel.pipeline", "parallel.cut", "parallel.timeout", "parallel.trace"}


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


def tied_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide what a run computes, as plain dicts and lists."""
    values = to_dict(config)
    for key in FREE:
        *outer, last = key.split(".")
        place = values
        for name in outer:
            place = place.get(name, {})
        place.pop(last, None)
    return {key: value for key, value in values.items() if value != {}}


def changed_settings(saved: TrainConfig, given: TrainConfig) -> list[str]:
    """``key: value there -> value here`` for every setting that decides what a run computes and is another one."""
    there, here = (tied_settings(config.resolved()) for config in (saved, given))
    return list(differences(there, here))


def check_same_settings(found: Any, config: TrainConfig, where: str | os.PathLike[str]) -> None:
    """Refuse what was saved under other settings, naming them. Raises CheckpointError."""
    try:
        saved = from_dict(TrainConfig, found, str(where))
        changed = changed_settings(saved, config)
    except ConfigError as error:
        raise CheckpointError(f"{where} holds settings that are none: {error}") from error
    if changed:
        raise CheckpointError(
            f"{where} was saved under other settings ({'; '.join(changed)}): resume it under those, or start another run"
        )


def described(model: nn.Module) -> list[str]:
    """One line per module: its name, its class and, for PyTorch's own, its options."""
    lines = []
    for name, module in model.named_modules():
        own = type(module).__module__.startswith("torch.nn.")
        options = module.extra_repr() if own else ""
        lines.append(f"{name or 'the network'}: {type(module).__qualname__}({options})")
    return lines


def check_same_network(found: Any, model_lines: list[str], where: str | os.PathLike[str]) -> None:
    """Refuse the state of a network whose modules were others, naming the first. Raises CheckpointError."""
    if found == model_lines:
        return
    pairs = itertools.zip_longest(found, model_lines, fillvalue="nothing")
    there, here = next((a, b) for a, b in pairs if a != b)
    raise CheckpointError(
        f"{where} belongs to another model: it had '{there}' where now there is '{here}'; give it that model, or start another run"
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
        missing = [printable(str(name)) for name in there if name not in here]
        new = [printable(name) for name in here if name not in there]
        gone = f", without {', '.join(missing[:3])}" if missing else ""
        more = f", with {', '.join(new[:3])}" if new else ""
        return f"it had {len(there)} classes, here there are {len(here)}{more}{gone}"
    first = next(i for i, (a, b) in enumerate(zip(there, here, strict=True)) if a != b)
    was, now = printable(str(there[first])), printable(here[first])
    return f"its class {first} was '{was}', here it is '{now}'"
