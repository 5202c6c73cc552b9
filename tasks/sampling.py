"""Chains around a checkpoint: losses of all examples along them, stored in whole chunks as the chains go on.

    settled.json                  the options with every "auto" replaced, the curvature that they follow from, and a warning where due
    trajectories.zarr/...         the arrays of tda.schema: losses, measurements, distances
    state/<group>.safetensors     where the chains of a group stand, with how many of their pieces are stored; gone when all is done
    diagnostics.json              R-hat, effective sample sizes and what to make of them
    complete.json                 last

A group of chains is one task, which stores its draws and then its state after every piece: a killed worker costs one piece at most, and
the chain goes on to the same bytes.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infra import storage
from tasks import checksums, layout
from tasks.diagnosis import diagnosis
from tasks.subject import Subject, open_subject
from tasks.tensors import read_tensors, write_tensors
from tda import location, schema
from tda.errors import InputError, cause
from tda.recipe import load_all
from tda.sampling.chains import ChainState, Landscape, landscape, start, state_from, state_tensors
from tda.sampling.options import STEP_SIZE_CONVENTION, Piece, Sampling
from tda.sampling.recording import Recorded, Recorder
from tda.sampling.settle import given, settle
from tda.sampling.stored import Trajectories, chunk_examples, fitting_segment, open_trajectories

#: Beside a chain's own tensors in its state: the loss of every batch so far, how many pieces are stored, and how chains advance.
_LOSSES, _PIECES, _HOW = "stored/batch_loss", "stored/pieces", "stored/how"


@dataclass(frozen=True)
class SampleJob:
    """The chains of one checkpoint. options: JSON of a `Fit` of kind "chains", "auto" where a number is to be chosen, and the seed.

    batch_size: examples of one linearisation, where the curvature is looked at.
    """

    url: str
    subject: Subject
    options: str
    examples: int
    queries: int
    batch_size: int

    @property
    def asked(self) -> dict[str, Any]:
        """The options as they were asked for."""
        found: dict[str, Any] = json.loads(self.options)
        return found

    @property
    def tokens(self) -> bool:
        """Whether losses of single tokens are stored, too."""
        return bool(self.asked["tokens"])

    @property
    def cut(self) -> Sampling:
        """The options with made-up numbers for "auto": which chains a group has does not depend on them."""
        return given(self.asked)

    @property
    def zarr(self) -> str:
        """URL of the group of the arrays."""
        return location.join(self.url, "trajectories.zarr")

    def state(self, group: int) -> str:
        """URL of a group's state."""
        return location.join(self.url, "state", f"{group:06d}.safetensors")


def prepare(job: SampleJob) -> dict[str, Any]:
    """Choose what is "auto", hold the step size against its bound, and create the arrays; one task, before any chain starts."""
    started = time.perf_counter()
    url = location.join(job.url, "settled.json")
    if not location.exists(url):
        opened = open_subject(job.subject)
        found = settle(opened.attributed, opened.train, job.asked, batch_size=job.batch_size)
        tokens = _tokens(job) if job.tokens else None
        segment = fitting_segment(found.sampling, _numbers(job, tokens))
        cut = replace(found.sampling, segment=segment)
        _create(job, cut, tokens)
        storage.write_json(url, {"sampling": asdict(cut), **found.told})
    return {"seconds": time.perf_counter() - started}


def settled_of(job: SampleJob) -> dict[str, Any]:
    """settled.json of prepared chains."""
    return location.read_json(location.join(job.url, "settled.json"))


def _tokens(job: SampleJob) -> tuple[int, int]:
    """Positions of the longest example of each split."""
    opened = open_subject(job.subject)
    like = next(opened.attributed.model.parameters())
    lengths = [int(load_all(opened.attributed.problem, data, like).targets.shape[1]) for data in (opened.train, opened.query)]
    return lengths[0], lengths[1]


def _numbers(job: SampleJob, tokens: tuple[int, int] | None) -> int:
    """What is stored of a draw of one chain: losses, measurements, and tokens where asked."""
    return job.examples + 2 * job.queries + (job.examples * tokens[0] + job.queries * tokens[1] if tokens else 0)


def _create(job: SampleJob, sampling: Sampling, tokens: tuple[int, int] | None) -> None:
    group = location.open_group(job.zarr, "a")
    told = {name: getattr(sampling, name) for name in ("sampler", "step_size", "n_beta", "localization")}
    group.attrs.update({"schema_version": schema.SCHEMA_VERSION, **told, "step_size_convention": STEP_SIZE_CONVENTION})
    c, t = sampling.chains, sampling.draws
    rows = (min(sampling.together, c), min(sampling.segment, t))
    sizes = {"loss_train": job.examples, "loss_query": job.queries, "measurement_query": job.queries}
    for name, n in sizes.items():
        layout.ensure_array(group, name, (c, t, n), (*rows, min(n, chunk_examples(c, t))))
    if tokens is not None:
        for name, n, k in (("token_loss_train", job.examples, tokens[0]), ("token_loss_query", job.queries, tokens[1])):
            layout.ensure_array(group, name, (c, t, n, k), (*rows, min(n, chunk_examples(c, t, k)), k))
    for name in ("mean_loss_train", "distance"):
        layout.ensure_array(group, name, (c, t), rows)
    layout.ensure_array(group, "batch_loss", (c, sampling.steps), (rows[0], sampling.steps))
    location.seal(job.zarr)


@lru_cache(maxsize=1)
def _ready(job: SampleJob) -> tuple[Sampling, Landscape, Recorder]:
    """What all groups share, kept for the next of the same worker."""
    opened = open_subject(job.subject)
    sampling = Sampling(**settled_of(job)["sampling"])
    shared = landscape(opened.attributed, sampling, opened.train)
    return sampling, shared, Recorder(opened.attributed, shared, opened.train, opened.query, tokens=job.tokens)


def sample_group(task: tuple[SampleJob, int]) -> dict[str, Any]:
    """Take a group's chains to their end, from where they were left."""
    job, group = task
    started, url = time.perf_counter(), job.state(group)
    if layout.is_complete(job.url):
        return {"seconds": 0.0}
    first, losses, state = _taken_up(job, group)
    pieces, chains = Sampling(**settled_of(job)["sampling"]).pieces, job.cut.groups[group]
    for p in range(first, len(pieces)):
        sampling, shared, recorder = _ready(job)
        state, recorded = recorder.record(state or start(shared, list(chains)), pieces[p])
        losses = torch.cat([losses, recorded.batch_loss.float()], 1)
        over = len(state.lost) == len(chains)  # what is left of the arrays stays as it was created: NaN
        _write(job, chains, pieces[p], recorded)
        if over or p + 1 == len(pieces):
            padded = torch.nn.functional.pad(losses, (0, sampling.steps - losses.shape[1]), value=torch.nan)
            _group(job)["batch_loss"][chains.start : chains.stop] = padded.numpy()
        stored = len(pieces) if over else p + 1
        how = torch.frombuffer(bytearray(shared.how.encode()), dtype=torch.uint8)
        write_tensors(url, state_tensors(state) | {_LOSSES: losses, _PIECES: torch.tensor(stored), _HOW: how})
        if over:
            break
    return {"seconds": time.perf_counter() - started}


def _taken_up(job: SampleJob, group: int) -> tuple[int, Tensor, ChainState | None]:
    """How many pieces of a group are stored, the losses of its batches so far, and its state; nothing at all at the beginning."""
    if not location.exists(job.state(group)):
        return 0, torch.empty(len(job.cut.groups[group]), 0), None
    tensors = read_tensors(job.state(group))
    losses, pieces = tensors.pop(_LOSSES), int(tensors.pop(_PIECES))
    return pieces, losses, state_from(_own(tensors))


def _group(job: SampleJob) -> Any:
    return location.open_group(job.zarr, "r+")


def _write(job: SampleJob, chains: range, piece: Piece, recorded: Recorded) -> None:
    """Write what was recorded of a piece: whole chunks."""
    if not len(piece.draws):
        return
    group, where = _group(job), (slice(chains.start, chains.stop), slice(piece.draws.start, piece.draws.stop))
    found = {name: getattr(recorded, name) for name in ("loss_train", "loss_query", "measurement_query", "distance")}
    found["mean_loss_train"] = recorded.loss_train.mean(2, dtype=torch.float64)
    if job.tokens:
        found |= {"token_loss_train": recorded.token_loss_train, "token_loss_query": recorded.token_loss_query}
    for name, values in found.items():
        group[name][where] = values.numpy()


def finish(job: SampleJob) -> dict[str, Any]:
    """Read every chunk back, judge the chains, write the completion marker, drop the states.

    Where a chunk is damaged, its group's state is deleted, so that the same command samples the group again, and an ArithmeticError
    says so.

    Raises:
        InputError: every chain was lost.
    """
    started = time.perf_counter()
    if not layout.is_complete(job.url):
        known = settled_of(job)
        lost: dict[int, str] = {}
        how = ""
        for group in range(len(job.cut.groups)):
            tensors = read_tensors(job.state(group))
            lost |= state_from(_own(tensors)).lost
            how = bytes(tensors[_HOW].tolist()).decode()
        if len(lost) == job.cut.chains:
            raise InputError(all_lost(lost, known))
        told = {**known, "lost": {str(chain): lost[chain] for chain in sorted(lost)}, "examples": job.examples, "queries": job.queries}
        told |= {"tokens": job.tokens, "step_size_convention": STEP_SIZE_CONVENTION, "how": how}
        stored = Trajectories(job.url, told)
        sums = _verify(job, stored)
        storage.write_json(location.join(job.url, "diagnostics.json"), diagnosis(stored))
        checksums.complete(job.url, told, {f"trajectories.zarr/{name}": entry for name, entry in sums.items()})
        storage.delete_tree(location.join(job.url, "state"))
    return {"seconds": time.perf_counter() - started}


def _own(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in (_LOSSES, _PIECES, _HOW)}


def all_lost(lost: dict[int, str], known: dict[str, Any]) -> str:
    """What is said where no chain reached its end."""
    size, bound = known["sampling"]["step_size"], known.get("bound")
    under = f" below the bound {bound:.3g}" if bound and bound < size else f", e.g. to {size / 10:.3g}"
    return f"all {len(lost)} chains were lost: {lost[min(lost)]}; lower step_size from {size:.3g}{under}"


def _verify(job: SampleJob, stored: Trajectories) -> dict[str, list[Any]]:
    """Every chunk of the chains that reached their end holds numbers; the sums of what was read."""
    sums: dict[str, list[Any]] = {}
    arrays: Any = location.open_group(job.zarr, "r", sums)
    schema.validate(arrays, sorted(arrays.array_keys()))
    for name in sorted(arrays.array_keys()):
        array = arrays[name]
        width = array.chunks[2] if array.ndim > 2 else 1
        for g, chains in enumerate(job.cut.groups):
            alive = [chain - chains.start for chain in chains if chain in stored.chains]
            for first in range(0, array.shape[2] if array.ndim > 2 else 1, width):
                where = (slice(chains.start, chains.stop), slice(None), *((slice(first, first + width),) if array.ndim > 2 else ()))
                if said := _wrong(array, where, alive):
                    storage.delete(job.state(g))
                    raise ArithmeticError(f"{name} of chains {chains.start}..{chains.stop - 1}: {said}; the next try samples them again")
    return sums


def _wrong(array: Any, where: tuple[Any, ...], alive: list[int]) -> str:
    """What is wrong with a part of an array; empty where nothing is."""
    try:
        return "" if np.isfinite(array[where][alive]).all() else "a value is missing or not finite"
    except (InputError, OSError):  # the store's trouble, not the chunk's
        raise
    except Exception as error:  # noqa: BLE001  (a damaged chunk may raise anything that its codecs do)
        return f"cannot be read ({cause(error)})"


@lru_cache(maxsize=2)
def load(url: str) -> tuple[Trajectories, ...]:
    """The trajectories of completed chains, kept for the next task of the same worker."""
    return (open_trajectories(url),)


def diagnostics_of(job: SampleJob) -> dict[str, Any]:
    """diagnostics.json of completed chains."""
    return location.read_json(location.join(job.url, "diagnostics.json"))


def warnings(job: SampleJob) -> list[str]:
    """What to say before the chains of a job start."""
    said = settled_of(job).get("warning", "")
    return [said] if said else []


def tuned(job: SampleJob) -> dict[str, Any]:
    """What would be chosen for "auto", and why; nothing is written."""
    started = time.perf_counter()
    opened = open_subject(job.subject)
    found = settle(opened.attributed, opened.train, job.asked, batch_size=job.batch_size)
    return {"seconds": time.perf_counter() - started, "sampling": asdict(found.sampling), **found.told}
