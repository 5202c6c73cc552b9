"""LDS by rung: whether the scores of a better curvature predict retraining better.

artifacts/ladder_lds/<fingerprint>/numbers.safetensors    named as in the schema, without the axis `point`
artifacts/ladder_lds/<fingerprint>/complete.json          last
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tasks import checksums, layout, retraining
from tasks.decompose import Point, PointJob, Study
from tasks.decompose_measure import ladder_influence, load_ladder
from tasks.retraining import RetrainJob
from tasks.subject import open_subject
from tasks.tensors import write_tensors
from tda import location
from tda.evaluation.ceiling import mean_ceiling
from tda.evaluation.lds import bootstrap, interval, lds
from tda.fingerprint import fingerprint

#: Raised by one when what is computed here changes.
VERSION = 3
#: Resamples of the subsets for each interval.
DRAWS = 200


@dataclass(frozen=True)
class LdsJob:
    """The LDS of a point: where it is stored, of which point, by which retraining."""

    url: str
    point: PointJob
    truth: RetrainJob


def lds_job(study: Study, point: Point, job: PointJob) -> LdsJob | None:
    """The LDS of a point at the end of its training; None where the study has no [evaluation], or the point lies on the way.

    Raises InputError where the retraining is out of range.
    """
    if not study.evaluation or point.progress != 1:
        return None
    asked = json.loads(study.evaluation)
    subject, seed = point.request.subject, point.request.seed
    wanted = RetrainJob("", subject.problem, subject.options, tuple(asked["alphas"]), asked["subsets"], asked["seeds"], seed)
    truth = retraining.plan(study.store, wanted)
    key = fingerprint("ladder_lds", point=job.url.rpartition("/")[2], truth=truth.url.rpartition("/")[2], draws=DRAWS, version=VERSION)
    return LdsJob(layout.artifact(study.store, "ladder_lds", key), job, truth)


def evaluate(job: LdsJob) -> dict[str, Any]:
    """Score by every rung and inverse, and compare with the retraining, which is done."""
    started = time.perf_counter()
    if not layout.is_complete(job.url):
        opened, truth = open_subject(job.point.subject), retraining.load_truth(job.truth.url)
        rungs = ladder_influence(load_ladder(job.point, opened), opened, job.point)
        scores = torch.stack(rungs, 1).numpy()  # (inverse, rung, query, train)
        found, bounds, steps, ceilings = [], [], [], []
        for masks, measured in zip(truth.masks, truth.measurement, strict=True):
            masks = masks.astype(bool)  # noqa: PLW2901
            found.append(lds(scores, masks, measured))
            draws = bootstrap(scores, masks, measured, draws=DRAWS)
            mean = found[-1].mean(-1)
            bounds.append(_bounds(draws, mean, within=1.0))
            steps.append(_bounds(np.diff(draws, axis=1), np.diff(mean, axis=1), within=2.0))  # paired: all rungs see the same resamples
            ceilings.append(mean_ceiling(measured)[0] if job.truth.seeds > 1 else np.nan)
        numbers = {"rung_lds": np.stack(found), "rung_lds_bound": np.stack(bounds), "rung_lds_step_bound": np.stack(steps)}
        numbers |= {"rung_lds_ceiling": np.array(ceilings)}
        tensors = {name: torch.from_numpy(np.ascontiguousarray(each, np.float64)) for name, each in numbers.items()}
        write_tensors(location.join(job.url, "numbers.safetensors"), tensors)
        checksums.complete(job.url, {"arrays": sorted(tensors)})
    return {"seconds": time.perf_counter() - started}


def _bounds(draws: np.ndarray[Any, Any], means: np.ndarray[Any, Any], within: float) -> np.ndarray[Any, Any]:
    """Both ends of the interval of each mean, (..., bound), from its resamples (..., draw); none is outside [-within, within]."""
    ends = [interval(row, mean, within=within) for row, mean in zip(draws.reshape(-1, draws.shape[-1]), means.ravel(), strict=True)]
    return np.array([[end.low, end.high] for end in ends]).reshape(*means.shape, 2)
