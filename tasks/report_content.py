"""How an example is shown: whatever a problem's `describe` returns, as a picture, text, or named fields."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

Split = Literal["train", "query"]

LONGEST_SIDE = 192  # pixels of a stored picture; larger ones are scaled down
PIXELATED_BELOW = 64  # smaller pictures keep their pixels visible when they are enlarged
LONGEST_TEXT = 1200  # characters
MOST_NUMBERS = 12


class Describes(Protocol):
    """The part of a problem that a report needs."""

    def describe(self, split: Split, i: int) -> Any:
        """Text, image or dict that shows example i."""


@dataclass(frozen=True)
class Content:
    """One example as the page shows it: exactly one of `uri` (a PNG), `text` or `fields` is filled."""

    uri: str = ""
    width: int = 0
    height: int = 0
    pixelated: bool = False
    text: str = ""
    omitted: int = 0
    fields: tuple[tuple[str, Content], ...] = ()


def described(problem: Describes, split: Split, i: int) -> Content:
    """Example i of a split as Content; where the problem cannot describe it, the reason as text."""
    try:
        return content(problem.describe(split, i))
    except Exception as error:  # noqa: BLE001  (a user's describe may raise anything, and must not cost the report of a finished run)
        return _text(f"cannot be shown: {type(error).__name__}: {error}")


def content(value: Any) -> Content:
    """Content of an array (H, W), (C, H, W) or (H, W, C) with C in 1, 3, 4; of a PIL image, text, a mapping, or anything with a str."""
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, Mapping):
        return Content(fields=tuple((str(name), content(part)) for name, part in value.items()))
    if hasattr(value, "convert") and hasattr(value, "thumbnail"):
        return _picture(value)
    array = _array(value)
    if array is None:
        return _text(str(value))
    pixels = _pixels(array)
    return _text(_numbers(array)) if pixels is None else _picture(_image(pixels))


def _array(value: Any) -> np.ndarray[Any, Any] | None:
    """A numeric array, from NumPy, a tensor on any device, or a sequence of numbers; None for anything else."""
    value = value.detach().cpu().float() if hasattr(value, "detach") and value.is_floating_point() else value
    try:
        array = np.asarray(value.cpu() if hasattr(value, "cpu") else value)
    except ValueError:  # a ragged sequence
        return None
    return array if array.dtype.kind in "biuf" else None


def _pixels(array: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint8]] | None:
    """(H, W) or (H, W, C) bytes of what is an image; None where the shape is none.

    Bytes stay as they are; floats within [0, 1] are scaled by 255; all else is stretched from its smallest to its largest value,
    so that standardised images show too.
    """
    match array.shape:
        case (_, _) | (_, _, 3 | 4):
            pass
        case (_, _, 1):
            array = array[:, :, 0]
        case (1, _, _):
            array = array[0]
        case (3 | 4, _, _):
            array = array.transpose(1, 2, 0)
        case _:
            return None
    if array.size == 0:
        return None
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    values = np.nan_to_num(array.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = values.min(), values.max()
    if low < 0 or high > 1:
        values = (values - low) / (high - low) if high > low else np.zeros_like(values)
    return np.ascontiguousarray(np.rint(values * 255).astype(np.uint8))


def _image(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> Image:
    import PIL.Image

    return PIL.Image.fromarray(pixels)


def _picture(image: Image) -> Content:
    import PIL.Image

    image = image.convert("RGBA" if image.mode in ("RGBA", "LA", "PA") else "L" if image.mode in ("1", "L") else "RGB")
    pixelated = max(image.size) < PIXELATED_BELOW
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), PIL.Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Content(uri=uri, width=image.width, height=image.height, pixelated=pixelated)


def _text(text: str) -> Content:
    return Content(text=text[:LONGEST_TEXT] or "(empty)", omitted=max(0, len(text) - LONGEST_TEXT))


def _numbers(array: np.ndarray[Any, Any]) -> str:
    flat = array.reshape(-1)
    shown = ", ".join(f"{value:.4g}" for value in flat[:MOST_NUMBERS])
    if array.ndim == 0:
        return shown
    shape = " × ".join(map(str, array.shape))  # noqa: RUF001  (read by people)
    return f"{shown}{', …' if flat.size > MOST_NUMBERS else ''} ({shape})"
