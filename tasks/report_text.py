"""Numbers, durations, shares and dates as people read them."""

from __future__ import annotations

import math
from datetime import UTC, datetime

_MINUS = "\N{MINUS SIGN}"
_NOTHING = "\N{EN DASH}"


def number(value: float, digits: int = 3, *, padded: bool = False) -> str:
    """Three significant digits with a true minus; powers of ten where the number is very small or large; a dash for NaN.

    Args:
        value: the number.
        digits: how many are significant.
        padded: keep zeros at the end, so that numbers in a row have the same look.
    """
    if not math.isfinite(value):
        return _NOTHING
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1000:
        return format(value, f"#.{digits}g" if padded else f".{digits}g").removesuffix(".").replace("-", _MINUS)
    if 1000 <= abs(value) < 1e6:
        return f"{value:,.0f}".replace("-", _MINUS)
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    return f"{mantissa}e{int(exponent)}".replace("-", _MINUS)


def seconds(value: float) -> str:
    """A duration of `value` seconds."""
    if value >= 3600:
        return f"{int(value // 3600)} h {int(value % 3600 // 60)} min"
    if value >= 90:
        return f"{int(value // 60)} min {int(value % 60)} s"
    return f"{value:.1f} s" if value >= 0.1 else f"{1000 * value:.0f} ms"


def percent(share: float) -> str:
    """A share as percent, never rounded to a false 0 or 100."""
    if 0 < share < 0.001:
        return "< 0.1 %"
    if 0.999 <= share < 1:
        return "> 99.9 %"
    return f"{100 * share:.1f} %".replace(".0 %", " %")


def date(created: str) -> str:
    """An ISO 8601 moment such as 2026-11-22T02:00:00+00:00 as "22 November 2026, 02:00 UTC"; unchanged where it is none."""
    try:
        moment = datetime.fromisoformat(created)
    except ValueError:
        return created
    if moment.tzinfo is None:
        return f"{moment.day} {moment:%B %Y, %H:%M}"
    moment = moment.astimezone(UTC)
    return f"{moment.day} {moment:%B %Y, %H:%M} UTC"
