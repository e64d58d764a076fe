"""Checkpoints: nested Python values and tensors in one safetensors file, without pickle.

The tensors are stored as safetensors does; the nesting (dicts, lists, tuples, numbers, strings, None) is JSON
in the file's metadata, where a tensor is a reference to its name. Floats, integer keys and tuples survive
exactly. A file is written beside its final place, synced to disk and moved over the old one, so a crash or a
full disk leaves the previous checkpoint whole.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from feedbackward.errors import CheckpointError

FORMAT = "feedbackward.checkpoint"
VERSION = "1"
_SCALARS = (bool, int, str, type(None))


def save(path: str | os.PathLike[str], state: Any) -> None:
    """Write ``state`` to ``path``, atomically.

    Args:
        path: the file to write; its folder exists.
        state: nested dicts, lists and tuples of tensors, numbers, strings and None.

    Raises:
        CheckpointError: the state holds something else, or the file cannot be written; the old one is then
            untouched.
    """
    tensors: dict[str, Tensor] = {}
    body = json.dumps(_pack(state, "state", tensors))
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "crc": str(_crc(body, tensors)),
        "state": body,
    }
    replace_file(Path(path), lambda temporary: save_file(tensors, temporary, metadata))


def load(path: str | os.PathLike[str]) -> Any:
    """Read what `save` wrote; tensors come back on the CPU.

    Raises:
        CheckpointError: no such file, not a feedbackward checkpoint, of another version, or corrupt.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"there is no checkpoint at {path}: check the path, or train without --resume"
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            _check_format(path, metadata)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        intact = str(_crc(metadata["state"], tensors)) == metadata.get("crc")
        state = _unpack(json.loads(metadata["state"]), tensors) if intact else None
    except CheckpointError:
        raise
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"the checkpoint {path} is truncated or not a safetensors file ({error}): use an older copy of it"
        ) from error
    # of what another program wrote in our format
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"the checkpoint {path} is not of the form that it says ({type(error).__name__}: {error}): "
            "use an older copy of it"
        ) from error
    if not intact:
        raise CheckpointError(
            f"the checkpoint {path} is corrupt (wrong checksum): use an older copy of it"
        )
    return state


def check_same_tensors(found: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> None:
    """Refuse a state dict that belongs to another module, naming the first key or shape that differs.

    Args:
        found: what the checkpoint holds, name -> tensor.
        expected: the state dict of the module that is to receive it.
        where: what to call the checkpoint in the message.
    """
    other = f"{where} belongs to another model"
    for name, tensor in expected.items():
        if name not in found:
            raise CheckpointError(f"{other}: it has no '{name}', which this model needs")
        got, want = _signature(found[name]), _signature(tensor)
        if got != want:
            raise CheckpointError(f"{other}: '{name}' is {got} there and {want} here")
    for name in found:
        if name not in expected:
            raise CheckpointError(f"{other}: it has '{name}', which this model lacks")


def replace_file(path: Path, write: Any) -> None:
    """Call ``write(temporary_path)``, sync the result to disk, and move it to ``path`` in one step.

    Raises:
        CheckpointError: the file could not be written; whatever was at ``path`` is still there.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # safetensors makes files that only their owner can read
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        kept = "; the previous one is untouched" if path.exists() else ""
        raise CheckpointError(
            f"could not write {path} ({error}){kept}: free some space or choose another folder"
        ) from error


def _sync_folder(folder: Path) -> None:
    """Make the move itself durable; systems that cannot open a folder do without."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _signature(value: Any) -> str:
    return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"


def _crc(body: str, tensors: Mapping[str, Tensor]) -> int:
    """Over the structure and every tensor's name, shape and bytes: safetensors itself checks sizes only."""
    crc = zlib.crc32(body.encode())
    for name in sorted(tensors):
        crc = zlib.crc32(f"{name} {_signature(tensors[name])}".encode(), crc)
        crc = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, crc)
    return crc


def _check_format(path: Path, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT or "state" not in metadata:
        raise CheckpointError(
            f"{path} is a safetensors file but not a checkpoint of feedbackward: check the path"
        )
    if metadata.get("version") != VERSION:
        raise CheckpointError(
            f"the checkpoint {path} has format version {metadata.get('version')}, this feedbackward reads "
            f"{VERSION}: use the feedbackward version that wrote it (see environment.json beside it)"
        )


def _pack(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON; its tensors are added to ``tensors`` and referred to by name."""
    if isinstance(value, _SCALARS):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, Tensor):
        name = f"{len(tensors)}:{where}"
        # a copy, because safetensors refuses tensors that share memory
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, Mapping):
        pairs = value.items()
        return {
            "dict": [
                [_pack(k, where, tensors), _pack(v, f"{where}.{k}", tensors)] for k, v in pairs
            ]
        }
    if isinstance(value, list | tuple):
        items = [_pack(item, f"{where}.{i}", tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    raise CheckpointError(
        f"{where} is a {type(value).__name__}, which a checkpoint cannot hold: "
        "use tensors, numbers, strings, None and dicts, lists or tuples of them"
    )


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "float":
        return float(content)
    if kind == "tuple":
        return tuple(_unpack(item, tensors) for item in content)
    return {_unpack(key, tensors): _unpack(item, tensors) for key, item in content}
