"""What a study measures at one point, and how its arrays come together.

artifacts/decomposition/<fingerprint>/numbers.safetensors    named as in the schema, without the axis `point`
artifacts/decomposition/<fingerprint>/complete.json          last
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tasks import checksums, layout
from tasks.decompose import TOPS, PointJob
from tasks.dense import load_spectra
from tasks.subject import Opened, open_subject
from tasks.tensors import write_tensors
from tda import location
from tda.curvature.spectrum import Inverse, rounding
from tda.decomposition import REFERENCES, RUNGS, Rung, alike, compare, from_factors, from_spectra, shares_of_steps
from tda.decomposition_layers import layer_errors, layer_masses, off_block_mass
from tda.decomposition_scores import flat_gradients, ladder_scores
from tda.evaluation.lds import spearman
from tda.stored_factors import load_factors

#: Shares of the ranks at which a spectrum is kept: even on a logarithmic axis at the large end, on a linear one at the small end.
QUANTILES = np.unique(np.concatenate([np.geomspace(1e-3, 1, 40), np.linspace(0.025, 1, 40)]).round(6))
DEFINITIONS = ("inverse", "product")


def measure(job: PointJob) -> dict[str, Any]:
    """Measure one point, unless that is done. Takes `tasks.decompose.measured_bytes` of memory."""
    started = time.perf_counter()
    if not layout.is_complete(job.url):
        opened = open_subject(job.subject)
        rungs = load_ladder(job, opened)
        inverses = inverses_of(job, rungs)
        found = _errors(rungs, inverses)
        found |= _layers(rungs, inverses, [block.size for block in opened.attributed.blocks])
        found |= _state(rungs[0], opened, job) | _agreement(rungs, opened, job)
        found["spectrum_curve"] = torch.stack([_curve(rung.values) for rung in rungs])
        found["kept"] = torch.stack([torch.stack([(r.inverted(i) != 0).double().mean() for r in rungs]) for i in inverses])
        write_tensors(location.join(job.url, "numbers.safetensors"), found)
        checksums.complete(job.url, {"arrays": sorted(found)})
    return {"seconds": time.perf_counter() - started}


def load_ladder(job: PointJob, opened: Opened) -> list[Rung]:
    """The rungs of a point, in the order of RUNGS."""
    blocks = opened.attributed.blocks
    dense = [from_spectra(name, blocks, load_spectra(found.url)) for name, found in zip(REFERENCES, job.spectra, strict=True)]
    factors = load_factors(job.factors.url, blocks)
    return [*dense, from_factors("ekfac", factors), from_factors("kfac", factors)]


def inverses_of(job: PointJob, rungs: Sequence[Rung]) -> list[Inverse]:
    """The inverses with the lambda and the threshold that they have for the Hessian: all rungs are inverted alike."""
    return [alike(inverse, rungs[0]) for inverse in job.parsed()]


def _errors(rungs: Sequence[Rung], inverses: Sequence[Inverse]) -> dict[str, Tensor]:
    """Errors of every rung from each reference above it, the shares of the steps, and the overlaps of bases and spectra."""
    upper, all_ = len(REFERENCES), len(RUNGS)
    error = _nan(len(DEFINITIONS), len(inverses), upper, all_)
    share = _nan(len(DEFINITIONS), len(inverses), upper, all_ - 1)
    matrix, spectrum, basis = _nan(upper, all_), _nan(upper, all_), _nan(upper, all_, len(TOPS))
    for r in range(upper):
        error[:, :, r, r], matrix[r, r], spectrum[r, r], basis[r, r] = 0.0, 0.0, 1.0, 1.0
        for k in range(r + 1, all_):
            found = compare(rungs[r], rungs[k], inverses, TOPS)
            error[0, :, r, k], error[1, :, r, k] = found.inverse, found.product
            matrix[r, k], spectrum[r, k], basis[r, k] = found.matrix, found.spectrum, found.basis
        share[:, :, r, r:] = shares_of_steps(error[:, :, r, r:])
    return {"error": error, "error_share": share, "matrix_error": matrix, "spectrum_overlap": spectrum, "basis_overlap": basis}


def _layers(rungs: Sequence[Rung], inverses: Sequence[Inverse], sizes: Sequence[int]) -> dict[str, Tensor]:
    edges = np.cumsum([0, *sizes]).tolist()
    masses = torch.stack([layer_masses(rung, edges) for rung in rungs[: len(REFERENCES)]])
    basis, spectrum = _nan(len(RUNGS), len(sizes), len(TOPS)), _nan(len(RUNGS), len(sizes))
    first = REFERENCES.index("block_ggn")
    for layer in range(len(sizes)):
        for k in range(first, len(RUNGS)):
            found = compare(rungs[first].only(layer), rungs[k].only(layer), [], TOPS)
            basis[k, layer], spectrum[k, layer] = found.basis, found.spectrum
    return {
        "layer_error": torch.stack([layer_errors(rungs, len(REFERENCES), edges, inverse) for inverse in inverses]),
        "layer_mass": masses,
        "off_block_mass": torch.tensor([off_block_mass(mass) for mass in masses], dtype=torch.float64),
        "layer_basis_overlap": basis,
        "layer_spectrum_overlap": spectrum,
    }


def _state(hessian: Rung, opened: Opened, job: PointJob) -> dict[str, Tensor]:
    """How well the model is trained: mean losses, the gradient that is left, and how indefinite the Hessian is."""
    attributed, loss = opened.attributed, opened.attributed.problem.likelihood.loss
    gradients, train = flat_gradients(attributed, opened.train, loss, batch_size=job.batch_size)
    gradient = gradients.mean(0)
    del gradients
    query = flat_gradients(attributed, opened.query, loss, batch_size=job.batch_size)[1]
    values = hessian.values
    negative = values[values < -rounding(values)].norm() / values.norm()
    return {"mean_loss": torch.stack([train.mean(), query.mean()]), "gradient_norm": gradient.norm(), "negative_mass": negative}


def _agreement(rungs: Sequence[Rung], opened: Opened, job: PointJob) -> dict[str, Tensor]:
    """Mean over queries of the rank correlation, over training examples, of each rung's scores with the Hessian's."""
    found = [scores.numpy() for scores in ladder_influence(rungs, opened, job)]
    agreement = [[spearman(a, b).mean() for a, b in zip(found[0], rung, strict=True)] for rung in found]
    return {"agreement": torch.from_numpy(np.array(agreement, np.float64).T.copy())}


def ladder_influence(rungs: Sequence[Rung], opened: Opened, job: PointJob) -> list[Tensor]:
    """Scores (inverse, query, train) of each rung."""
    attributed = opened.attributed
    train = flat_gradients(attributed, opened.train, attributed.problem.likelihood.loss, batch_size=job.batch_size)[0]
    queries = flat_gradients(attributed, opened.query, attributed.problem.measurement, batch_size=job.batch_size)[0]
    inverses = inverses_of(job, rungs)
    return [ladder_scores(rung, inverses, queries, train) for rung in rungs]


def _curve(values: Tensor) -> Tensor:
    """Eigenvalues at QUANTILES of the ranks, the largest first."""
    ranks = np.ceil(QUANTILES * len(values)).astype(int).clip(1, len(values)) - 1
    return values.sort(descending=True)[0][torch.from_numpy(ranks)]


def _nan(*shape: int) -> Tensor:
    return torch.full(shape, torch.nan, dtype=torch.float64)


def steps() -> list[str]:
    """Names of the steps from rung to rung."""
    return [f"{a} to {b}" for a, b in pairwise(RUNGS)]
