"""Where a store keeps things."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import zarr
from zarr.errors import ContainsArrayError

from tda import location, schema


def artifact(store: str, kind: str, fingerprint: str) -> str:
    """The folder of an artifact."""
    return location.join(store, "artifacts", kind, fingerprint)


def run(store: str, run_id: str) -> str:
    """The folder of a run."""
    return location.join(store, "runs", run_id)


def ensure_array(group: zarr.Group, name: str, shape: Sequence[int], *rest: Any) -> Any:
    """As schema.create_array, but an array that is there stays: a killed run, or one of the same configuration beside this one, made it."""
    try:
        return schema.create_array(group, name, shape, *rest)
    except ContainsArrayError:
        return group[name]


def is_complete(url: str) -> bool:
    """Whether an artifact's completion marker is there."""
    return location.exists(location.join(url, "complete.json"))
