"""Fingerprints: short digests of everything that determines an artifact's numbers."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from tda.schema import SCHEMA_VERSION


def fingerprint(kind: str, **parts: Any) -> str:
    """20 hexadecimal digits of the sha256 of an artifact's kind, the schema version and its parts as canonical JSON."""
    text = json.dumps([kind, SCHEMA_VERSION, parts], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:20]
