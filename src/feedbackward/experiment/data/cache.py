"""A checked cache of decoded images: one safetensors file per source, with its SHA-256 beside it."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import PIL
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from feedbackward.errors import DataError
from feedbackward.experiment.data.decode import Decoded, Images
from feedbackward.experiment.data.sources import Source

ABANDONED = 3600  # seconds after which an unfinished write belongs to nobody
VERSION = 3  # of the decoding: raise it whenever the same files would give other tensors


def cache_folder() -> Path:
    """`$FEEDBACKWARD_CACHE`, or `feedbackward` in the user's cache folder."""
    own = os.environ.get("FEEDBACKWARD_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "feedbackward"


def cached(source: Source, size: int | None, decode: Callable[[], Decoded]) -> Decoded:
    """The decoded images of `source` from the cache, or from `decode()`, then kept.

    A cache file counts only if its bytes have the digest stored beside it and it was made from the same files
    (path, size, times, inode) with the same options. An altered or truncated one is decoded
    again with a warning; one whose source has changed is replaced. Where the cache cannot be written, a warning says
    so and the images are used without it.

    Raises DataError where a file of the source changes while it is decoded.
    """
    path = cache_folder() / f"{_file_stem(source, size)}.safetensors"
    before = fingerprint(source, size)
    kept = _read(path, before)
    if kept is not None:
        return kept
    decoded = decode()
    if fingerprint(source, size) != before:
        raise DataError(
            f"Data set {source} changed while it was read: start again when nothing writes to it."
        )
    try:
        _write(path, decoded, before)
    except (OSError, SafetensorError) as error:
        warnings.warn(
            f"Decoded images are not kept, the next run decodes them again: cannot write {path} ({error}); "
            "set FEEDBACKWARD_CACHE to a writable folder.",
            RuntimeWarning,
            stacklevel=2,
        )
    return decoded


def _file_stem(source: Source, size: int | None) -> str:
    # one file per place and size: a source that changed replaces its file instead of leaving a stale one
    place = hashlib.sha256(f"{source.kind}:{source.folder}".encode(errors="surrogateescape"))
    # readable, and short enough for any file system, whatever the folder is called
    name = re.sub(r"[^\w.-]+", "-", source.name, flags=re.ASCII)[:40]
    return f"{name}-{size or 'full'}-{place.hexdigest()[:8]}"


def fingerprint(source: Source, size: int | None) -> str:
    """A digest of everything that decides what decoding gives: options, names, and each file's state."""
    try:
        # one file in place of another may have its size and its time of modification, but not all of these
        files = [
            (str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
            for path in source.files
            for stat in [path.stat()]
        ]
    except OSError as error:
        raise DataError(
            f"{error.filename} cannot be read ({error.strerror}): it was there a moment ago."
        ) from error
    # repr covers every column, split and mode of the specification
    identity = [
        VERSION,
        PIL.__version__,
        repr(source.spec),
        sorted(source.splits.items()),
        str(source.folder),
        source.listing and source.listing.classes,
        size,
        files,
    ]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _digest_path(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _read(path: Path, expected: str) -> Decoded | None:
    try:
        stored = _digest_path(path).read_text().split()[:1]
        if stored != [_digest(path)]:
            warnings.warn(
                f"Cache {path} is damaged or half written: decoding again.",
                RuntimeWarning,
                stacklevel=3,
            )
            return None
        with safe_open(path, framework="pt") as file:
            metadata = json.loads(file.metadata()["feedbackward"])
            if metadata["fingerprint"] != expected:
                return None
            names = metadata["splits"]
            splits = {
                n: Images(file.get_tensor(f"{n}.images"), file.get_tensor(f"{n}.labels"))
                for n in names
            }
            return Decoded(splits, metadata["classes"], metadata["note"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        warnings.warn(
            f"Cache {path} cannot be read ({error}): decoding again.", RuntimeWarning, stacklevel=3
        )
        return None


def _write(path: Path, decoded: Decoded, made_from: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, images in decoded.splits.items():
        tensors[f"{name}.images"], tensors[f"{name}.labels"] = images.images, images.labels
    about = {
        "fingerprint": made_from,
        "classes": decoded.classes,
        "splits": list(decoded.splits),
        "note": decoded.note,
    }
    _remove_abandoned(path.parent)
    # a folder of its own, so that whatever the write leaves behind on failure goes with it
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as folder:
        data, digest = Path(folder) / path.name, Path(folder) / "digest"
        # one entry, because several are written in random order and the bytes should be the same every time
        save_file(tensors, data, {"feedbackward": json.dumps(about)})
        digest.write_text(f"{_digest(data)}  {path.name}\n")  # the format of `sha256sum --check`
        os.replace(data, path)
        os.replace(digest, _digest_path(path))


def _remove_abandoned(folder: Path) -> None:
    """Remove what processes left that were killed while they wrote; a write takes seconds."""
    for left in folder.glob(".writing-*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > ABANDONED:
                shutil.rmtree(left)
