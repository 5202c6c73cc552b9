"""What every solver takes and gives: the systems (C + damping) x = b, one per query, and their solutions with the path to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

#: (vectors (query, D), ids of examples or None for all) -> C v, the mean over those examples: `Operator.product`.
Product = Callable[[Tensor, Sequence[int] | None], Tensor]
#: P^-1 v for vectors (query, D).
Precondition = Callable[[Tensor], Tensor]
#: All that a solver needs to go on bit for bit, as tensors by name.
State = dict[str, Tensor]
OnStep = Callable[[State], None]

#: A residual that has grown by this much, relative to the right-hand side, comes back no more.
DIVERGED = 1e3


@dataclass(frozen=True)
class System:
    """(C + damping) x = b for every query.

    product: C v. damping: scalar () or (D,), in the units of the curvature. right: b, (query, D). examples: N, over which C is a mean.
    """

    product: Product
    damping: Tensor
    right: Tensor
    examples: int

    def apply(self, x: Tensor, ids: Sequence[int] | None = None) -> Tensor:
        """(C + damping) x for x (query, D), with C the mean over examples `ids`, or over all."""
        return self.product(x, ids) + self.damping.to(x) * x

    def residual(self, x: Tensor, ids: Sequence[int] | None = None, queries: Tensor | None = None) -> Tensor:
        """b - (C + damping) x for x (some queries, D); queries: which ones, as indices or a mask; None: all."""
        return (self.right if queries is None else self.right[queries]) - self.apply(x, ids)

    @property
    def scale(self) -> Tensor:
        """||b|| per query, (query,); 1 where b is 0, whose solution is 0."""
        norms = lengths(self.right)
        return torch.where(norms > 0, norms, 1.0)


@dataclass(frozen=True)
class Solution:
    """Solutions and how they were reached.

    x (query, D). residuals (K, query): ||b - (C + damping) x|| / ||b|| as the solver saw it at K moments, estimated on the mini-batch or
    the sample where it works on one; the last row is over all examples. evaluations (K,) float64: products of an example's Jacobian or
    gradient that one query had cost by then (a product over all N examples is N; what serves all queries at once is shared out among
    them). steps: of the solver. converged (query,): whether the last residual is within the tolerance.
    """

    x: Tensor
    residuals: Tensor
    evaluations: Tensor
    steps: int
    converged: Tensor


@dataclass
class Trace:
    """Residuals (K, query) and evaluations (K,) as they come."""

    residuals: list[Tensor] = field(default_factory=list)
    evaluations: list[float] = field(default_factory=list)

    def add(self, residual: Tensor, evaluations: float) -> None:
        """A moment: residuals (query,), and what one query has cost so far."""
        self.residuals.append(residual.clone())
        self.evaluations.append(float(evaluations))

    def state(self) -> State:
        """As tensors."""
        return {"residuals": torch.stack(self.residuals), "evaluations": torch.tensor(self.evaluations, dtype=torch.float64)}

    @classmethod
    def of(cls, state: State) -> Trace:
        """From `state()`."""
        return cls(list(state["residuals"]), state["evaluations"].tolist())

    def solution(self, x: Tensor, steps: int, tolerance: float) -> Solution:
        """The solution whose last residuals are the trace's."""
        told = self.state()
        return Solution(x, told["residuals"], told["evaluations"], steps, self.residuals[-1] <= tolerance)


def lengths(vectors: Tensor) -> Tensor:
    """||v|| per query, (query,)."""
    found: Tensor = torch.linalg.vector_norm(vectors, dim=1)
    return found


def inner(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> per query, (query,)."""
    found: Tensor = torch.linalg.vecdot(a, b)
    return found


def goal(tolerance: float, checked: Tensor) -> Tensor:
    """The relative residual (query,) at which the one that a solver carries along must be computed anew.

    The tolerance, or what is nothing but rounding beside the one computed last (infinite where there is none yet).
    """
    rounding = 10 * torch.finfo(checked.dtype).eps
    return (rounding * torch.where(torch.isinf(checked), 1.0, checked)).clamp(min=tolerance)


@lru_cache(maxsize=2)
def permutation(examples: int, seed: int, epoch: int) -> np.ndarray:
    """All example ids in the order of an epoch, int64: a function of (seed, epoch) alone."""
    generator = np.random.Generator(np.random.Philox(key=[seed % 2**64, epoch]))
    return generator.permutation(examples)


def mini_batch(examples: int, batch_size: int | None, seed: int, step: int) -> Sequence[int] | None:
    """Example ids of step 0, 1, ...: pieces of the epochs' permutations, the same for all queries; None where all examples are used.

    What is left of an epoch that `batch_size` does not divide is left out, so that every batch weighs the same.
    """
    if batch_size is None or batch_size >= examples:
        return None
    epoch, piece = divmod(step, examples // batch_size)
    ids: list[int] = permutation(examples, seed, epoch)[piece * batch_size : (piece + 1) * batch_size].tolist()
    return ids
