"""A curvature matrix formed in full and eigendecomposed, once for every damping, threshold and query.

    partial/rows/<diagonal>/<first row>.safetensors    rows of one diagonal block, one object per task
    partial/spectra/<diagonal>.json                    says that a diagonal block is decomposed
    spectra.zarr/diagonals/<diagonal>/...              spectrum (n,) and eigenvectors (n, n, one per row), float64
    complete.json                                      last

The Hessian and the GGN are one diagonal block, the block-diagonal GGN is one per layer. Every object is written whole; a task whose
object is there already, or whose spectra are complete, does nothing: what was interrupted goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn, cast

import numpy as np
import torch
from torch import Tensor

from infra import storage
from tasks import checksums, layout
from tasks.subject import Opened, Subject, open_subject
from tasks.tensors import read_tensors, write_tensors
from tda import location, schema
from tda.curvature import spectrum
from tda.curvature.spectrum import Spectrum
from tda.data import batches
from tda.directions import check_finite
from tda.errors import InputError, cause
from tda.solvers.operator import Curvature, Operator

#: Rows that one task computes: products with so many vectors share each linearisation, and there are enough tasks for several workers.
ROWS = 256
#: Eigenvectors are stored in square chunks of at most so many rows: 32 MiB.
CHUNK = 2048
#: A GGN's eigenvalue below minus this share of the largest is no rounding.
CONVEX = 1e-9


@dataclass(frozen=True)
class DenseJob:
    """The spectra of one curvature: where they are stored, of what, and how many examples share a linearisation.

    subject: in float64.
    """

    url: str
    subject: Subject
    curvature: Curvature
    examples: int
    batch_size: int

    @property
    def zarr(self) -> str:
        """The group that holds the spectra."""
        return location.join(self.url, "spectra.zarr")


@dataclass(frozen=True)
class Rows:
    """Rows start..stop of one diagonal block, which begins at `offset` in flat coordinates and is `size` wide."""

    job: DenseJob
    diagonal: int
    offset: int
    size: int
    start: int
    stop: int

    @property
    def url(self) -> str:
        """Where they are."""
        return location.join(self.job.url, "partial", "rows", str(self.diagonal), f"{self.start:08d}.safetensors")


def create(job: DenseJob) -> None:
    """Create the arrays; called once, before any task writes to them."""
    created = location.join(job.url, "partial", "created.json")
    if _done(job, created):
        return
    blocks = open_subject(job.subject).attributed.blocks
    diagonals = spectrum.diagonals(blocks, job.curvature)
    sizes = [sum(blocks[b].size for b in some) for some in diagonals]
    group = location.open_group(job.zarr, "a")
    told: dict[str, Any] = {"schema_version": schema.SCHEMA_VERSION, "curvature": job.curvature, "examples": job.examples}
    group.attrs.update(told | {"diagonals": [list(some) for some in diagonals], "sizes": sizes})
    for d, (some, n) in enumerate(zip(diagonals, sizes, strict=True)):
        attrs = {"layers": [blocks[b].name for b in some]}
        layout.ensure_array(group, f"diagonals/{d}/spectrum", [n], None, attrs)
        layout.ensure_array(group, f"diagonals/{d}/eigenvectors", [n, n], [min(n, CHUNK)] * 2, attrs)
    location.seal(job.zarr)
    storage.write_json(created, {})


def row_tasks(job: DenseJob) -> list[Rows]:
    """The tasks of `rows`, once the arrays are created; none where the spectra are complete."""
    if layout.is_complete(job.url):
        return []
    found, offset = [], 0
    for d, n in enumerate(_sizes(job)):
        found += [Rows(job, d, offset, n, start, min(start + ROWS, n)) for start in range(0, n, ROWS)]
        offset += n
    return found


def rows(task: Rows) -> dict[str, Any]:
    """Compute some rows of a diagonal block, and write them.

    Raises InputError where an example's loss is not finite; ArithmeticError where the curvature itself is not.
    """
    started = time.perf_counter()
    job = task.job
    if not _done(job, task.url):
        opened = open_subject(job.subject)
        whole = _operator(job).rows(task.offset + task.start, task.offset + task.stop)
        found = whole[:, task.offset : task.offset + task.size].double()
        if not bool(torch.isfinite(found).all()):
            _explain(opened, job)
        write_tensors(task.url, {"rows": found})
    return {"seconds": time.perf_counter() - started}


@lru_cache(maxsize=1)
def _operator(job: DenseJob) -> Operator:
    """Kept for the next rows of the same worker: it holds the examples that it has read."""
    opened = open_subject(job.subject)
    return Operator(opened.attributed, opened.train, job.curvature, job.batch_size)


def _explain(opened: Opened, job: DenseJob) -> NoReturn:
    """Find the example that made the curvature infinite: InputError where its loss is not finite, else ArithmeticError."""
    attributed = opened.attributed
    with torch.no_grad():
        for ids in batches(range(job.examples), job.batch_size):
            batch = attributed.load(opened.train, ids)
            check_finite(attributed.problem.likelihood.loss(attributed.tape(batch).precise, batch.targets), ids, "loss of train example")
    raise ArithmeticError(f"the {job.curvature} is not finite, though every loss is: a second derivative of the model overflows")


def decompose_tasks(job: DenseJob) -> list[tuple[DenseJob, int]]:
    """The tasks of `decompose`, the largest first; none where the spectra are complete."""
    if layout.is_complete(job.url):
        return []
    sizes = _sizes(job)
    return [(job, d) for d in sorted(range(len(sizes)), key=lambda d: -sizes[d])]


def decompose(task: tuple[DenseJob, int]) -> dict[str, Any]:
    """Eigendecompose one diagonal block, and write its spectrum.

    Raises InputError where a GGN has negative eigenvalues: the likelihood's output Hessian is not that of a convex loss.
    """
    job, diagonal = task
    started = time.perf_counter()
    if not _done(job, _receipt(job, diagonal)):
        _operator.cache_clear()
        values, vectors = spectrum.decompose(_matrix(job, diagonal), overwrite=True)
        if spectrum.is_psd(job.curvature) and float(values[0]) < -CONVEX * float(values.abs().max()):
            raise InputError(
                f"the {job.curvature} has the eigenvalue {float(values[0]):g}, so the likelihood's hessian_product is of no convex loss; "
                'mend it, or use the method "hessian"'
            )
        group = location.open_group(job.zarr, "r+")
        _array(group, diagonal, "spectrum")[...] = values.numpy()
        _array(group, diagonal, "eigenvectors")[...] = vectors.T.numpy()
        storage.write_json(_receipt(job, diagonal), {"size": len(values)})
    return {"seconds": time.perf_counter() - started}


def _matrix(job: DenseJob, diagonal: int) -> Tensor:
    """One diagonal block (n, n)."""
    some = [task for task in row_tasks(job) if task.diagonal == diagonal]
    matrix = torch.empty(some[0].size, some[0].size, dtype=torch.float64)
    for task in some:
        found = _stored(task)
        if found is None:  # lost or damaged after it was written
            storage.delete(task.url)
            rows(task)
            found = _stored(task)
        if found is None:
            raise ArithmeticError(f"rows {task.start}..{task.stop - 1} of the {job.curvature} at {task.url} cannot be read")
        matrix[task.start : task.stop] = found
    return matrix


def _stored(task: Rows) -> Tensor | None:
    """A task's rows, None where they are absent or damaged."""
    try:
        found = read_tensors(task.url)["rows"]
    except FileNotFoundError:
        return None
    except (InputError, OSError):  # the store's trouble, not the object's
        raise
    except Exception:  # noqa: BLE001  (a damaged object may raise anything that its format does)
        return None
    return found if found.shape == (task.stop - task.start, task.size) else None


def finish(job: DenseJob) -> dict[str, Any]:
    """Verify every array, write the completion marker, and drop the matrix. A spectrum that is damaged is made again."""
    started = time.perf_counter()
    if not layout.is_complete(job.url):
        sums: dict[str, list[Any]] = {}
        for diagonal in range(len(_sizes(job))):
            try:
                _read(job.url, diagonal, sums=sums)
            except ArithmeticError:
                storage.delete(_receipt(job, diagonal))
                decompose((job, diagonal))
                _read(job.url, diagonal, sums=sums)
        marker = {"curvature": job.curvature, "examples": job.examples, "sizes": _sizes(job)}
        if checksums.complete(job.url, marker, {f"spectra.zarr/{name}": entry for name, entry in sums.items()}):
            storage.delete_tree(location.join(job.url, "partial"))
    return {"seconds": time.perf_counter() - started}


def load_spectra(url: str, *, vectors: bool = True) -> tuple[Spectrum, ...]:
    """Completed spectra, one per diagonal block; without `vectors` their eigenvalues alone, and empty matrices.

    Raises InputError where they are damaged.
    """
    attrs = location.open_group(location.join(url, "spectra.zarr"), "r").attrs
    try:
        return tuple(_read(url, diagonal, vectors=vectors) for diagonal in range(len(cast("Sequence[Any]", attrs["sizes"]))))
    except ArithmeticError as error:
        raise InputError(f"{url}: {error}; delete that folder and start the run again, which computes it anew") from error


def _read(url: str, diagonal: int, *, vectors: bool = True, sums: dict[str, list[Any]] | None = None) -> Spectrum:
    """One diagonal block's spectrum; ArithmeticError where a chunk is lost or damaged."""
    group = location.open_group(location.join(url, "spectra.zarr"), "r", sums)
    found = []
    for name in ("spectrum", "eigenvectors") if vectors else ("spectrum",):
        try:
            values = np.asarray(_array(group, diagonal, name)[...])
        except (InputError, OSError):  # the store's trouble, not the chunk's
            raise
        except Exception as error:  # (a damaged chunk may raise anything that its codecs do)
            raise ArithmeticError(f"{name} of diagonal block {diagonal} cannot be read ({cause(error)})") from error
        if not np.isfinite(values.sum()):
            raise ArithmeticError(f"{name} of diagonal block {diagonal} has a value that is missing or not finite")
        found.append(torch.from_numpy(values))
    blocks = cast("Sequence[Sequence[int]]", group.attrs["diagonals"])[diagonal]
    return Spectrum(tuple(blocks), found[0], found[1].T if vectors else torch.empty(0, 0, dtype=torch.float64))


def _array(group: Any, diagonal: int, name: str) -> Any:
    return group[f"diagonals/{diagonal}/{name}"]


def _sizes(job: DenseJob) -> list[int]:
    return list(cast("Sequence[int]", location.open_group(job.zarr, "r").attrs["sizes"]))


def _receipt(job: DenseJob, diagonal: int) -> str:
    return location.join(job.url, "partial", "spectra", f"{diagonal:06d}.json")


def _done(job: DenseJob, url: str) -> bool:
    """Whether a task's object is there, or all spectra."""
    return location.exists(url) or layout.is_complete(job.url)
