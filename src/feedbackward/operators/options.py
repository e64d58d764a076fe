"""Checks of the options that several operators have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

from feedbackward.errors import AttachError


def check_init(init: object, known: Sequence[str]) -> None:
    """Refuse an initialisation that is not among the known ones."""
    if init not in known:
        raise AttachError(
            f"unknown feedback initialisation {init!r}: choose one of {', '.join(known)}."
        )


def check_scale(scale: object) -> None:
    """Refuse a scale that is no finite number from 0."""
    if isinstance(scale, bool) or not isinstance(scale, Real) or not 0 <= float(scale) < math.inf:
        raise AttachError(
            f"scale={scale!r}, a factor on the feedback: give a finite number, 1.0 by default."
        )


def check_count(name: str, value: object) -> None:
    """Refuse an option that is no whole number from 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise AttachError(f"{name}={value!r}: give a whole number of at least 1.")
