"""Secrets do not belong into a configuration, which every run stores."""

from __future__ import annotations

import re
from typing import Any

from infra.masking import masked

__all__ = ["masked", "refuse"]

_NAME = re.compile(
    r"(^|_)(password|passwd|passphrase|secret|secret_?key|api_?key|access_?key(_?id)?|private_?key|credentials?)$|^token$", re.IGNORECASE
)
#: Not every token: language models have a pad_token and others.
_TOKEN = re.compile(r"(^|_)(auth|access|api|hf|bearer|refresh|session)_?token$", re.IGNORECASE)
_IN_URL = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s:@'\"]*:[^/\s'\"]+@|https?://[^/\s?#'\"]+@", re.IGNORECASE)


def refuse(values: Any, where: str = "") -> None:
    """Look through a configuration's tables.

    Raises:
        ValueError: a key is named like a secret, or a text holds a URL with a password or a token; the message does not repeat it.
    """
    if isinstance(values, dict):
        for key, value in values.items():
            name = f"{where}.{key}" if where else str(key)
            if _is_told(value) and (_NAME.search(str(key)) or _TOKEN.search(str(key))):
                raise ValueError(f"{name} looks like a secret, and a run stores its configuration; let the problem read it from os.environ")
            refuse(value, name)
    elif isinstance(values, list | tuple):
        for place, value in enumerate(values):
            refuse(value, f"{where}.{place}")
    elif isinstance(values, str) and _IN_URL.search(values):
        raise ValueError(
            f"{where} is a URL with a password or a token, and a run stores its configuration; let the problem read it from os.environ"
        )


def _is_told(value: Any) -> bool:
    """Whether a value is a text, or a list with one."""
    return any(map(_is_told, value)) if isinstance(value, list | tuple) else isinstance(value, str) and bool(value)
