"""The page of a study."""
from typing import Any


def write_page(url: str, manifest: dict[str, Any]) -> None:
    """Nothing yet."""
