"""What has to be the same in every process of a run: the libraries that compute, and the problem."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version

import numpy as np
import torch

from tda.device import CPU, device_here
from tda.errors import InputError
from tda.problem import problem_digest

#: What to do where there is none.
NO_GPU = 'device = "cuda", and torch can use no GPU {}: `tda doctor` says why; mend that, or leave device out'


def place() -> tuple[str, int]:
    """This process, as no other is called."""
    return platform.node(), os.getpid()


def standing(problem: str, options: str, device: str = "auto", planner: tuple[str, int] = ("", 0)) -> dict[str, str]:
    """By name; `options` is JSON. Imports all that shards use, so that the first of them waits for nothing.

    device: as the run names it; `planner`, the process that plans it, needs none.

    Opens nothing: the weights may not be there yet, and a model opened without them would be held beside the right one.
    Raises InputError where the problem cannot be imported, or where this process lacks the device.
    """
    if device == "cuda" and planner != place() and device_here(device) == CPU:
        raise InputError(NO_GPU.format("there"))
    import tasks.scores  # noqa: F401  (and with it all that shards use)

    return {
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "tda": version("tda"),
        "torch": torch.__version__,
        "numpy": np.__version__,
        f"problem {problem} with digest": problem_digest(problem, json.loads(options))[:12],
    }
