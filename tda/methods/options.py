"""Options that several methods share, with their checks."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import BeforeValidator

from tda.curvature.inverse import Damping


def _sane(value: object) -> object:
    if value == "heuristic":
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f'damping must be a finite number >= 0 or "heuristic", got {value!r}')
    return float(value)


#: A number >= 0, or "heuristic": 0.1 x the mean eigenvalue.
SaneDamping = Annotated[Damping, BeforeValidator(_sane)]
