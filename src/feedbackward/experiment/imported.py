"""Names of the user's own code: `package.module:name`, or `path/to/file.py:name`."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from feedbackward.errors import ConfigError


def imported(name: str, what: str) -> Any:
    """The object of this name; what importing it raises, but for its absence, is not caught.

    Raises ConfigError, which calls it a `what`, if it cannot be found.
    """
    place, _, attribute = name.rpartition(":")
    try:
        module = _of_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        return functools.reduce(getattr, attribute.split("."), module)
    except (ImportError, AttributeError, ValueError, OSError) as error:
        raise ConfigError(
            f"the {what} {name!r} could not be imported ({error}): expected package.module:name or path/to/file.py:name. "
            "Check the spelling, or put the folder it lies in on PYTHONPATH."
        ) from error


def _of_file(path: Path) -> ModuleType:
    """The module of this file, which finds the files beside it as a script does."""
    path = path.resolve()
    # a name of its own: the file may be called as another module is
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
