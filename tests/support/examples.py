"""How many generated examples a property test tries: a few in the ordinary suite, many with NIGHTLY=1."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, settings

NIGHTLY = bool(os.environ.get("NIGHTLY"))


def examples(ordinary: int, nightly: int) -> Callable[[Any], Any]:
    """Settings with so many examples and no limit of time for each: the machine may be busy.

    The ordinary suite tries the same ones every time; the nightly mode looks further.
    """
    return settings(
        max_examples=nightly if NIGHTLY else ordinary,
        derandomize=not NIGHTLY,
        deadline=None,
        database=None,
        # a failing input is printed as it is: to shrink one costs more than the whole test
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
