"""Where a store keeps things."""

from __future__ import annotations

from tda import location


def artifact(store: str, kind: str, fingerprint: str) -> str:
    """The folder of an artifact."""
    return location.join(store, "artifacts", kind, fingerprint)


def run(store: str, run_id: str) -> str:
    """The folder of a run."""
    return location.join(store, "runs", run_id)


def is_complete(url: str) -> bool:
    """Whether an artifact's completion marker is there."""
    return location.exists(location.join(url, "complete.json"))
