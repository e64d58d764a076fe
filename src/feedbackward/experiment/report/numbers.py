"""Numbers as a report shows them."""

from __future__ import annotations

NONE = "–"


def fixed(value: float | None, digits: int = 1, sign: bool = False) -> str:
    """So many decimals, a true minus sign, never "-0.0"; a dash for None."""
    if value is None:
        return NONE
    rounded = round(value, digits) + 0.0
    return f"{rounded:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def plus_minus(
    value: float | None, error: float | None, digits: int = 1, sign: bool = False
) -> str:
    """`value ± error`, or the value alone where there is no error."""
    return fixed(value, digits, sign) + ("" if error is None else f" ± {fixed(error, digits)}")


def size(count: int | None) -> str:
    """Bytes as a short decimal size."""
    if not count:
        return NONE if count is None else "none"
    amount, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 999.5 or unit == "GB":
            break
        amount /= 1000
    return f"{amount:.3g} {unit}"
