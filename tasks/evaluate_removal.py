"""What is retrained to follow removals, and an untrained model to compare with."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from infra import storage
from tasks.evaluate import Evaluation, given
from tasks.retraining import load_truth
from tasks.subject import DTYPES
from tda import checkpoint, location
from tda.evaluation import effects, subsets
from tda.problem import load_problem
from tda.results import Run

_Array = np.ndarray[Any, Any]
#: The curve that the others are compared with.
RANDOM = "at random"


def asked(job: Evaluation) -> _Array:
    """Ids of the queries whose most helpful examples are removed: the first of those that are reported."""
    return np.flatnonzero(given(job).reported)[: job.told["removal_queries"]]


def masks(job: Evaluation, chosen: Sequence[int]) -> _Array:
    """Subsets (subset, train) bool: everything, then by method, query and share, then examples at random by share."""
    known, shares = given(job), job.told["removal"]
    examples = known.truth.masks.shape[2]
    groups = [np.empty(0, np.int64)]
    for m in chosen:
        scores = known.run.influence[m].to_numpy()
        for query in asked(job):
            groups += effects.most_helpful(scores[query], shares, known.run.better)
    groups += effects.at_random(examples, shares, job.told["seed"])
    return subsets.without(examples, groups)


def curves(job: Evaluation, chosen: Sequence[int], url: str) -> dict[str, _Array]:
    """harm (curve, share, asked), mean over seeds, with its coordinates; from the retraining of `masks` at `url`."""
    known, queries, shares = given(job), asked(job), job.told["removal"]
    measured = load_truth(url).measurement[0]
    by_query = effects.harm(measured[:1], measured, known.run.better).mean(1)  # (subset, query)
    rows, place = [], 1
    for _ in chosen:
        block = by_query[place : place + len(queries) * len(shares)].reshape(len(queries), len(shares), -1)
        rows.append(np.stack([block[i, :, query] for i, query in enumerate(queries)], 1))
        place += len(queries) * len(shares)
    rows.append(by_query[place:][:, queries])
    names = [*(known.run.methods[m] for m in chosen), RANDOM]
    return {"harm": np.stack(rows), "curve": np.array(names), "share": np.array(shares), "asked": queries}


def write_untrained(job: tuple[str, str, str, int, str]) -> dict[str, Any]:
    """Write the weights that a model starts with: (problem, JSON of its options, dtype, seed, URL)."""
    problem, options, dtype, seed, url = job
    started = time.perf_counter()
    if not location.exists(url):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = load_problem(problem, json.loads(options)).model()
        storage.write_bytes(url, checkpoint.dump(model if dtype == "auto" else model.to(DTYPES[dtype])))
    return {"seconds": time.perf_counter() - started}


def randomised(job: Evaluation, untrained: Run) -> _Array:
    """Rank correlation (method, query) with an untrained model's scores; NaN for methods that it was not scored by."""
    from tda.evaluation.checks import agreement

    run = given(job).run
    scores = run.influence
    found = np.full(scores.shape[:2], np.nan)
    for place, method in enumerate(untrained.methods):
        m = run.methods.index(method)
        found[m] = agreement(scores[m].to_numpy(), untrained.influence[place].to_numpy())
    return found
