"""How well each method's scores predict retraining: one task per method, its numbers in one object.

<run>/evaluation/<fingerprint>/parts/<method>.safetensors    numbers of one method; gone when all is written
<run>/evaluation/<fingerprint>/complete.json                 last
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import Any

import numpy as np
import torch

import tda
from tasks import layout
from tasks.retraining import RetrainJob, Truth, load_truth
from tasks.tensors import read_tensors, write_tensors
from tda import location
from tda.errors import InputError
from tda.evaluation import checks, effects, subsets
from tda.evaluation.ceiling import ceiling, mean_ceiling
from tda.evaluation.lds import Interval, bootstrap, interval, lds
from tda.fingerprint import fingerprint
from tda.problem import Problem, load_problem
from tda.results import NotStored, Run

#: Raised by one when what is computed or stored here changes.
ARRAYS = 2
_Array = np.ndarray[Any, Any]
Numbers = dict[str, _Array]


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a run. run, truth, alone: URLs of the run, of its ground truth, and of that with single examples left out or "".

    families: of every method, the label of its sweep. options: JSON of the [evaluation] table.
    """

    url: str
    run: str
    truth: str
    alone: str
    families: tuple[str, ...]
    options: str

    @property
    def told(self) -> dict[str, Any]:
        """The [evaluation] table."""
        found: dict[str, Any] = json.loads(self.options)
        return found

    def part(self, method: int) -> str:
        """URL of a method's numbers."""
        return location.join(self.url, "parts", f"{method:04d}.safetensors")


def plan(run: Run, truth: str, alone: str, families: Sequence[str], options: str) -> Evaluation:
    """The evaluation with its place in the run."""
    names = [url.rpartition("/")[2] for url in (truth, alone)]
    config = run.manifest["config"]
    wrong = wrong_labels(load_problem(config["problem"], config["problem_options"]), run.influence.shape[2])
    asked = {"run": run.id, "truth": names, "families": list(families), "options": json.loads(options), "version": tda.__version__}
    asked |= {"arrays": ARRAYS}
    # The run does not depend on which labels are wrong, and a problem may read that from a file.
    asked |= {"wrong": "" if wrong is None else sha256(np.packbits(wrong).tobytes()).hexdigest()}
    mark = fingerprint("evaluation", **asked)
    return Evaluation(location.join(run.url, "evaluation", mark), run.url, truth, alone, tuple(families), options)


def examine(options: dict[str, Any], families: Sequence[str], job: RetrainJob) -> None:
    """Raise InputError, before anything is written, where the queries or examples are too few, or a sweep cannot be tuned."""
    problem = load_problem(job.problem, json.loads(job.options))
    chosen = subsets.tuning(len(problem.query_data()), options["tuning_queries"], options["seed"])
    swept = next((family for family in families if families.count(family) > 1), None)
    if swept is not None and not chosen.any():
        raise InputError(f"tuning_queries = 0 leaves nothing to choose a damping of {swept!r} by; give a share, or one damping")
    if options["removal"] and options["removal_queries"] > (~chosen).sum():
        raise InputError(
            f"removal_queries = {options['removal_queries']}, but of {len(chosen)} queries {(~chosen).sum()} are reported; "
            "ask for at most so many, give more queries, or tune on a smaller share"
        )
    if options["leave_one_out"]:
        subsets.left_out(len(problem.train_data()), options["leave_one_out"], options["seed"])
    wrong_labels(problem, len(problem.train_data()))


def wrong_labels(problem: Problem, examples: int) -> _Array | None:
    """(train,) bool, where the problem says which training labels are wrong, and some are and some are not."""
    if problem.mislabelled is None:
        return None
    wrong = np.asarray(problem.mislabelled, bool)
    if wrong.shape != (examples,):
        raise InputError(f"mislabelled of the problem has shape {wrong.shape}; it must be ({examples},), one value per training example")
    return wrong if wrong.any() and not wrong.all() else None


@dataclass(frozen=True)
class Given:
    """What all methods of an evaluation are held against."""

    run: Run
    truth: Truth
    alone: Truth | None
    tuning: _Array
    wrong: _Array | None

    @property
    def reported(self) -> _Array:
        """(query,) bool: the queries that are reported."""
        return ~self.tuning

    @property
    def inspected(self) -> _Array:
        """How many training examples are inspected for wrong labels: 5%, 10%, 20%, and as many as are wrong."""
        examples = len(self.wrong) if self.wrong is not None else 0
        wrong = int(self.wrong.sum()) if self.wrong is not None else 0
        return np.array([*(max(1, round(share * examples)) for share in (0.05, 0.1, 0.2)), wrong], np.int64)

    @property
    def left_out(self) -> _Array:
        """Ids of the examples left out one at a time."""
        assert self.alone is not None
        return np.array([int(np.flatnonzero(~mask)[0]) for mask in self.alone.masks[0, 1:]], np.int64)

    @property
    def effects(self) -> _Array:
        """What adding each of them did, (left_out, seed, query)."""
        assert self.alone is not None
        return effects.effects(self.alone.measurement[0])


@lru_cache(maxsize=1)
def given(job: Evaluation) -> Given:
    """Everything but the scores, kept for the next method of the same worker."""
    run = Run(job.run, location.read_json(location.join(job.run, "run.json")))
    truth, config = load_truth(job.truth), run.manifest["config"]
    tuned = subsets.tuning(truth.measurement.shape[3], job.told["tuning_queries"], job.told["seed"])
    wrong = wrong_labels(load_problem(config["problem"], config["problem_options"]), truth.masks.shape[2])
    return Given(run, truth, load_truth(job.alone) if job.alone else None, tuned, wrong)


def measure(task: tuple[Evaluation, int]) -> dict[str, Any]:
    """Compute the numbers of one method, and write them as one object."""
    job, method = task
    started = time.perf_counter()
    if not (location.exists(job.part(method)) or layout.is_complete(job.url)):
        numbers = _measured(job, given(job), method)
        write_tensors(
            job.part(method), {name: torch.from_numpy(np.ascontiguousarray(value, np.float64)) for name, value in numbers.items()}
        )
    return {"seconds": time.perf_counter() - started}


def numbers_of(job: Evaluation) -> list[Numbers]:
    """The numbers of every method."""
    return [{name: tensor.numpy() for name, tensor in read_tensors(job.part(m)).items()} for m in range(len(job.families))]


def _measured(job: Evaluation, known: Given, method: int) -> Numbers:
    run, truth, told = known.run, known.truth, job.told
    influence = run.influence[method].to_numpy()
    alphas = range(len(truth.alphas))
    found = {"lds": np.stack([lds(influence, truth.masks[a], truth.measurement[a]) for a in alphas])}
    some = known.reported
    draws = [
        bootstrap(influence[some], truth.masks[a], truth.measurement[a][..., some], draws=told["draws"], seed=told["seed"]) for a in alphas
    ]
    found["lds_draws"] = np.stack(draws)
    members = int(run.manifest["config"].get("ensemble", 1))
    if members > 1:
        each = [run.member(k)[method].to_numpy() for k in range(members)]
        found["member_lds"] = np.stack([[lds(one, truth.masks[a], truth.measurement[a]) for a in alphas] for one in each])
    return found | _left_out(known, influence, told) | _retrieved(known, influence) | _detected(known, method, told)


def _left_out(known: Given, influence: _Array, told: dict[str, Any]) -> Numbers:
    """Agreement with the effects of single examples: the same score as over subsets, with groups of one."""
    if known.alone is None:
        return {}
    groups, some = effects.alone(influence.shape[1], known.left_out), known.reported
    each = lds(influence, groups, known.effects)
    draws = bootstrap(influence[some], groups, known.effects[..., some], draws=told["draws"], seed=told["seed"])
    bounds = interval(draws, float(each[some].mean()), within=1.0)
    return {"leave_one_out": each, "leave_one_out_bounds": np.array([bounds.low, bounds.high])}


def _retrieved(known: Given, influence: _Array) -> Numbers:
    scores = known.run.influence
    if "query_label" not in scores.coords or "train_label" not in scores.coords:
        return {}
    labels = [scores.coords[name].to_numpy() for name in ("query_label", "train_label")]
    return {"retrieval": checks.retrieval(influence, labels[0], labels[1], known.run.better)}


def _detected(known: Given, method: int, told: dict[str, Any]) -> Numbers:
    if known.wrong is None:
        return {}
    try:
        own = known.run.self_influence[method].to_numpy()
    except NotStored:
        return {}
    bad = np.flatnonzero(~np.isfinite(own))
    if len(bad):
        return {"not_finite": bad}
    if np.ptp(own) == 0:  # of a cosine it is always -1, which says nothing of any example
        return {}
    found = checks.detect(own, known.wrong, known.inspected, seed=told["seed"])
    return {"mislabelled_auc": np.array([found.auc, found.bounds.low, found.bounds.high]), "mislabelled_precision": found.precision}


def choose(job: Evaluation, numbers: Sequence[Numbers]) -> list[int]:
    """The methods that are compared: of each sweep the one whose LDS on the tuning queries, over all alphas, is largest."""
    tuned = given(job).tuning
    best: dict[str, int] = {}
    for m, family in enumerate(job.families):
        if family not in best or _tuned(numbers[m], tuned) > _tuned(numbers[best[family]], tuned):
            best[family] = m
    return sorted(best.values())


def _tuned(numbers: Numbers, tuned: _Array) -> float:
    return float(numbers["lds"][:, tuned].mean()) if tuned.any() else 0.0


def ceilings(job: Evaluation) -> Numbers:
    """Noise ceilings by query and of the mean over reported queries; NaN with a single seed per subset, which says nothing of its noise."""
    known, seed = given(job), job.told["seed"]
    measured, some = known.truth.measurement, known.reported
    found = {"ceiling": np.full((len(measured), len(some)), np.nan), "mean_ceiling": np.full((len(measured), 3), np.nan)}
    if measured.shape[2] > 1:
        for a, each in enumerate(measured):
            found["ceiling"][a] = ceiling(each, seed=seed)
            found["mean_ceiling"][a] = _told(*mean_ceiling(each[..., some], seed=seed))
    if known.alone is not None and known.effects.shape[1] > 1:
        found["leave_one_out_ceiling"] = ceiling(known.effects, seed=seed, paired=True)
        found["leave_one_out_mean_ceiling"] = np.array(_told(*mean_ceiling(known.effects[..., some], seed=seed, paired=True)))
    return found


def _told(estimate: float, bounds: Interval) -> tuple[float, float, float]:
    """Estimate, low, high."""
    return estimate, bounds.low, bounds.high
