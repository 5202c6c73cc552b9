"""The library's numbers from end to end, in one process: what a run does, without Prefect, Dask or a store."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from tda.attributed import Attributed
from tda.curvature.covariances import Covariance, covariance_sums
from tda.curvature.eigen import Factor, decompose, eigenvalue_sums
from tda.directions import dense, query_gradients, squared_norms
from tda.methods import parse
from tda.methods.work import Work
from tda.modules import inspect
from tda.problem import Problem
from tda.scoring import Scorer, score
from tda.self_products import Kronecker


class Given(Problem):
    """A problem made of what a test has at hand; `predict(model, inputs)` and `mask(inputs)` where the defaults do not do."""

    def __init__(self, model, likelihood, train, queries=(), *, predict=None, mask=None):
        self.given, self.likelihood, self.train, self.queries, self._predict, self._mask = model, likelihood, train, queries, predict, mask

    def model(self):
        return self.given

    def train_data(self):
        return self.train

    def query_data(self):
        return self.queries

    def predict(self, model, batch):
        return super().predict(model, batch) if self._predict is None else self._predict(model, batch.inputs)

    def mask(self, batch):
        return super().mask(batch) if self._mask is None else self._mask(batch.inputs)


@dataclass(frozen=True)
class Outcome:
    """directions: by method, by block, (query, groups, out, in); factors: by Fisher, by block; influence (method, query, train)."""

    attributed: Attributed
    factors: dict[str, list[Factor]]
    directions: list[list[torch.Tensor]]
    influence: torch.Tensor
    self_influence: torch.Tensor | None
    mass: torch.Tensor


def attribute(
    problem: Problem,
    methods: Sequence[dict[str, Any]],
    *,
    batch_size: int = 5,
    cuts: Sequence[int] = (),
    seed: int = 0,
    selves: bool = True,
    attributed: Attributed | None = None,
    factors: dict[str, list[Factor]] | None = None,
) -> Outcome:
    """Everything that a run computes. cuts: where the training set is cut into shards. A method's damping may be a list, one per block."""
    train, queries = problem.train_data(), problem.query_data()
    attributed = attributed or inspect(problem, problem.model(), train)
    edges = [0, *cuts, len(train)]
    shards = [range(a, b) for a, b in pairwise(edges)]
    tables = [[_table(m, b) for b in range(len(attributed.blocks))] for m in methods]
    kinds = {need.of for row in tables for m in row for need in m.fits if need.kind == "kronecker"}
    factors = factors or {kind: fit(attributed, train, shards, fisher=kind, seed=seed, batch_size=batch_size) for kind in sorted(kinds)}
    found, _ = query_gradients(attributed, queries, range(len(queries)), batch_size=batch_size)
    norms = torch.stack([squared_norms(g) for g in found]).sum(0).sqrt()
    scorers = []
    for row in tables:
        work = Work(attributed, train, [factors[need.of] for need in row[0].fits], seed, batch_size)
        directions = [method.directions(work, found).passes[0][b] for b, method in enumerate(row)]
        scorers.append(Scorer(row[0].title, directions, norms, _own(row, work.curvature), row[0].cosine))
    parts = [score(attributed, scorers, train, ids, examples=len(train), batch_size=batch_size, self_influence=selves) for ids in shards]
    return Outcome(
        attributed,
        factors,
        [[dense(d) for d in s.directions] for s in scorers],
        torch.cat([p.influence for p in parts], 2),
        torch.cat([p.self_influence for p in parts], 1) if selves else None,
        torch.stack([p.mass for p in parts]).sum(0),
    )


def fit(attributed, train, shards, *, fisher, seed=0, batch_size=5) -> list[Factor]:
    """Factors with their EK-FAC eigenvalues, from the sums of all shards."""
    options = {"fisher": fisher, "seed": seed, "batch_size": batch_size}
    sums = [covariance_sums(attributed, train, ids, **options) for ids in shards]
    total = [Covariance(*(sum(getattr(c, f) for c in each) for f in ("out", "in_", "positions"))) for each in zip(*sums, strict=True)]
    factors = [decompose(b, c, len(train), attributed.dtype) for b, c in zip(attributed.blocks, total, strict=True)]
    squares = [eigenvalue_sums(attributed, factors, train, ids, **options) for ids in shards]
    return [replace(f, eigenvalues=sum(each) / len(train)) for f, each in zip(factors, zip(*squares, strict=True), strict=True)]


def _own(row, curvature):
    """Self-influence with each block's own damping."""
    owns = [method.own(curvature) for method in row]
    return Kronecker(owns[0].factors, [o.inverses[b] for b, o in enumerate(owns)]) if isinstance(owns[0], Kronecker) else owns[0]


def _table(options, block):
    damping = options.get("damping")
    return parse({**options, "damping": damping[block]} if isinstance(damping, list) else options)


def relative(found, wanted):
    """Largest difference as a share of the largest entry."""
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())


__all__ = ["Given", "Outcome", "attribute", "fit", "relative"]
