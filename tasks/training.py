"""Training the checkpoint of a run that gives none."""

from __future__ import annotations

import json
import time
from typing import Any

import torch

from infra import storage
from tasks import layout
from tasks.subject import DTYPES, Subject
from tda import checkpoint, location
from tda.problem import load_problem


def train(job: tuple[Subject, int, str]) -> dict[str, Any]:
    """Train the subject's model from scratch with a seed and write artifacts/checkpoint/<fingerprint>: weights, then the marker.

    job: (subject, seed, artifact URL). Does nothing where the artifact is complete.
    """
    subject, seed, url = job
    started = time.perf_counter()
    if not layout.is_complete(url):
        problem = load_problem(subject.problem, json.loads(subject.options))
        torch.manual_seed(seed)
        model = problem.model()
        model = model if subject.dtype == "auto" else model.to(DTYPES[subject.dtype])
        problem.fit(model, problem.train_data(), seed=seed, on_checkpoint=_ignore)
        data = checkpoint.dump(model)
        state = checkpoint.parse(data, "of the training just done")
        storage.write_bytes(location.join(url, "weights.safetensors"), data)
        storage.write_json(location.join(url, "complete.json"), {"seed": seed, "digest": checkpoint.digest(state)})
    return {"seconds": time.perf_counter() - started}


def _ignore(*_: Any, **__: Any) -> None:
    """Intermediate checkpoints: no method of a run needs them yet."""
