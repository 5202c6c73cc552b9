"""What has to be the same in every process of a run: the libraries that compute, and the problem."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version

import numpy as np
import torch

from tda.problem import problem_digest


def standing(problem: str, options: str) -> dict[str, str]:
    """By name; `options` is JSON. Imports all that shards use, so that the first of them waits for nothing.

    Opens nothing: the weights may not be there yet, and a model opened without them would be held beside the right one.
    Raises InputError where the problem cannot be imported.
    """
    import tasks.scores  # noqa: F401  (and with it all that shards use)

    return {
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "tda": version("tda"),
        "torch": torch.__version__,
        "numpy": np.__version__,
        f"problem {problem} with digest": problem_digest(problem, json.loads(options))[:12],
    }
