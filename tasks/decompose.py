"""A study of the curvature ladder: its points, what is decided about each before anything is computed, and what is measured there.

A point is one combination of swept options at one share of the training. What would take more memory than allowed is refused, and
stays in the study with the bytes that it would have taken.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tasks import layout, plan, prepare
from tasks.dense import CHUNK, DenseJob
from tasks.factors import FactorJob
from tasks.subject import Subject, open_subject
from tasks.training import read_trajectory
from tda import location
from tda.curvature.spectrum import Inverse, projected_bytes
from tda.decomposition import REFERENCES, RUNGS
from tda.errors import InputError
from tda.evaluation.subsets import subset_size
from tda.fingerprint import fingerprint

#: Raised by one when what is measured at a point changes.
VERSION = 2
#: How far the checkpoint that stands for a share of the training may lie from it, as a share of the training.
NEAR = 0.05
#: Chunks that zarr reads at a time.
READ = 10
#: Shares of the eigenvectors whose overlap is measured.
TOPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
_METHODS = tuple(json.dumps({"name": name, "memory_limit": "1024TiB"}) for name in REFERENCES)


@dataclass(frozen=True)
class Study:
    """What the user asked for, in strings and numbers.

    options: of the problem, fixed, and sweep: its options by lists, both as JSON. progress: shares of the training. inverses: options of
    `Inverse`, as JSON, by label. memory_limit: bytes. evaluation: options of the retraining as JSON, or "".
    """

    problem: str
    options: str
    sweep: str
    progress: tuple[float, ...]
    inverses: tuple[tuple[str, str], ...]
    store: str
    seed: int
    modules: tuple[str, ...]
    exclude: tuple[str, ...]
    memory_limit: int
    batch_size: int | None
    evaluation: str = ""

    def combinations(self) -> list[dict[str, Any]]:
        """The swept options, in the order of the configuration, the last one varying fastest."""
        sweep = json.loads(self.sweep)
        return [dict(zip(sweep, values, strict=True)) for values in itertools.product(*sweep.values())]


@dataclass(frozen=True)
class Point:
    """One point before it is computed: where it stands in the study, the request that trains it, and its size.

    swept: its swept options, as JSON. layers: names of its blocks. refused: why it is left out, "" where it is not.
    """

    swept: str
    progress: float
    request: prepare.Request
    inputs: prepare.Inputs
    layers: tuple[str, ...]
    sizes: tuple[int, ...]
    bytes: int
    refused: str

    @property
    def parameters(self) -> int:
        """D."""
        return sum(self.sizes)

    @property
    def training(self) -> tuple[Subject, int, str]:
        """The job of tasks.training.train."""
        return self.request.subject, self.request.seed, plan.training_artifact(self.request, self.inputs, self.request.seed)

    @property
    def named(self) -> dict[str, Any]:
        """Its swept options, and the share of the training where that is not all of it, for people."""
        options: dict[str, Any] = json.loads(self.swept)
        return options if self.progress == 1 else options | {"progress": self.progress}


@dataclass(frozen=True)
class PointJob:
    """What is measured at a point: where it is stored, of what, and from which spectra (of REFERENCES, in order) and factors."""

    url: str
    subject: Subject
    spectra: tuple[DenseJob, ...]
    factors: FactorJob
    inverses: tuple[str, ...]
    batch_size: int

    def parsed(self) -> list[Inverse]:
        """The inverses."""
        return [Inverse(**json.loads(text)) for text in self.inverses]


def examine(study: Study) -> list[Point]:
    """Every point, its problem loaded and checked, nothing written.

    Raises InputError where a combination of options is not usable, where its data cannot be cut into the subsets of the evaluation, or
    where no point fits into the memory that is allowed.
    """
    points = []
    for swept in study.combinations():
        request, inputs, blocks = _examined(study, swept)
        names, sizes = tuple(block.name for block in blocks), tuple(block.size for block in blocks)
        needed = max(projected_bytes(blocks, "hessian"), measured_bytes(sizes, inputs.examples, inputs.queries, len(study.inverses)))
        refused = "" if needed <= study.memory_limit else f"takes {_size(needed)}, memory_limit is {_size(study.memory_limit)}"
        points += [Point(json.dumps(swept), share, request, inputs, names, sizes, needed, refused) for share in study.progress]
    if all(point.refused for point in points):
        least = min(points, key=lambda point: point.bytes)
        raise InputError(
            f"every point of the sweep is too large: the smallest has {least.parameters:,} parameters and {least.refused}; "
            "raise memory_limit, exclude layers, or sweep over smaller models"
        )
    return points


def measured_bytes(sizes: Sequence[int], examples: int, queries: int, inverses: int) -> int:
    """Bytes that a worker holds at most while it measures a point of layers of so many parameters, but for some MiB.

    The eigenvectors of the Hessian, the GGN and its blocks, and the chunks that are being read, as stored, decoded and not yet given
    back; every example's gradient, and every query's twice; the scores of all rungs under all inverses, and again where they are stacked
    or ranked.
    """
    total = sum(sizes)
    vectors = 2 * total**2 + sum(size**2 for size in sizes) + 3 * min(total**2, READ * CHUNK**2)
    return 8 * (vectors + (examples + 2 * queries) * total + 2 * len(RUNGS) * inverses * queries * examples)


def _examined(study: Study, swept: dict[str, Any]) -> tuple[prepare.Request, prepare.Inputs, Any]:
    options = json.dumps(json.loads(study.options) | swept, sort_keys=True)
    subject = Subject(study.problem, options, "", study.modules, study.exclude, "auto")
    methods = (json.dumps({"name": "ekfac", "fisher": "exact"}),)
    request = prepare.Request(subject, study.store, study.seed, "full", methods, study.batch_size, None, None, self_influence=False)
    try:
        inputs = prepare.examine(request)
        for alpha in json.loads(study.evaluation)["alphas"] if study.evaluation else []:
            subset_size(inputs.examples, alpha)
    except InputError as error:
        raise InputError(f"{error} (with {listed(swept)})" if swept else str(error)) from error
    return request, inputs, open_subject(subject).attributed.blocks


def listed(options: dict[str, Any]) -> str:
    """Options for people: "depth 4, width 32"."""
    return ", ".join(f"{name} {value}" for name, value in options.items())


def fingerprint_of(study: Study, points: Sequence[Point]) -> str:
    """What determines a whole study's numbers."""
    asked = [[p.swept, p.progress, p.training[2].rpartition("/")[2], p.inputs.query, bool(p.refused)] for p in points]
    parts = [list(each) for each in study.inverses], list(study.modules), list(study.exclude), study.batch_size, study.evaluation
    return fingerprint("study", points=asked, parts=parts, version=VERSION)


def job_of(study: Study, point: Point) -> PointJob:
    """The jobs of a point whose training is done. Raises InputError as `moment_of`."""
    subject = replace(point.request.subject, checkpoint=moment_of(point).checkpoint, dtype="float64")
    member = plan.plan(replace(point.request, subject=subject, methods=(*point.request.methods, *_METHODS)), point.inputs).first
    spectra = tuple(member.fits[name] for name in REFERENCES)
    factors = member.fits["exact"]
    assert isinstance(factors, FactorJob)
    inverses = tuple(text for _, text in study.inverses)
    used = [job.url.rpartition("/")[2] for job in (*spectra, factors)]
    key = fingerprint(
        "decomposition", spectra=used, inverses=inverses, query=point.inputs.query, tops=TOPS, batch=factors.batch_size, version=VERSION
    )
    url = layout.artifact(study.store, "decomposition", key)
    return PointJob(url, member.subject, spectra, factors, inverses, factors.batch_size)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Moment:
    """When in its training a point is measured: the checkpoint's URL, its step and its share of all steps; no step at the end."""

    checkpoint: str
    share: float = 1.0
    step: int | None = None


def moment_of(point: Point) -> Moment:
    """What stands for a point whose training is done: what it ended with, or the stored checkpoint nearest to a share of its steps.

    Raises InputError where that checkpoint is untrained or farther from the share than NEAR, and where the training is not known.
    """
    folder = point.training[2]
    weights, asked = location.join(folder, "weights.safetensors"), f"progress = {point.progress:g}"
    if point.progress == 1:
        return Moment(weights)
    if not location.exists(location.join(folder, "trajectory.json")):
        call = "on_checkpoint(model=..., learning_rate=..., step=...)"
        raise InputError(
            f"{asked} needs checkpoints on the way, and fit of {point.request.subject.problem!r} reported none ({listed(point.named)}); "
            f"let it call {call} after each epoch, or measure the end alone with progress = [1.0]"
        )
    trajectory = read_trajectory(weights, asked)
    last = trajectory.saved[-1].step
    if not trajectory.whole:
        raise InputError(f"{asked}: the training went on after step {last}, its last report: call on_checkpoint after the last step, too")
    nearest = min(trajectory.saved, key=lambda one: abs(one.step - point.progress * last))
    if nearest.step == 0 or abs(nearest.step / last - point.progress) > NEAR:
        shares = ", ".join(f"{one.step / last:.3g}" for one in trajectory.saved[1:])
        raise InputError(
            f"{asked}: no checkpoint was stored near it ({listed(point.named)}); ask for some of {shares}, or let fit report more often"
        )
    return Moment(location.join(folder, nearest.name), nearest.step / last, nearest.step)


def _size(count: int) -> str:
    return f"{count / 2**30:.3g} GiB" if count >= 2**30 else f"{count / 2**20:.3g} MiB"
