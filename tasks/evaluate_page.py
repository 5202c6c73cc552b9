"""stub"""
from typing import Any
from tasks.evaluate import Evaluation
def write_page(job: Evaluation, manifest: dict[str, Any]) -> None:
    """Write."""
