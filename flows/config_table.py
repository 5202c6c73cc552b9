"""What the tables of a configuration have in common."""

import json
import math
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]


def _power_of_two(value: float) -> float:
    if not (math.isfinite(value) and value > 0 and math.frexp(value)[0] == 0.5):
        raise ValueError(f"autocast_scale must be a power of two such as 1024, so that it rounds nothing, got {shown(value)}")
    return value


PowerOfTwo = Annotated[float, AfterValidator(_power_of_two)]
# Strict: TOML has types, and a quoted number is a slip.
STRICT = ConfigDict(extra="forbid", strict=True, frozen=True)
LONGEST_VALUE = 80  # characters of a value repeated in a message


def shown(value: Any) -> str:
    """A value as TOML would have it, shortened."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):
        text = str(value)
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."
