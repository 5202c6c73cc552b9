"""What every solver takes and gives: the systems (C + damping) x = b, one per query, and their solutions with the path to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from tda.errors import InputError

#: (vectors (query, D), ids of examples or None for all) -> C v, the mean over those examples, a new tensor: `Operator.product`.
Product = Callable[[Tensor, Sequence[int] | None], Tensor]
#: P^-1 v for vectors (query, D), which stay as they are.
Precondition = Callable[[Tensor], Tensor]
#: All that a solver needs to go on bit for bit, as tensors by name. They are the solver's own, not copies: what on_step is given holds
#: until it returns, and a state that a solver is given to go on with is used up.
State = dict[str, Tensor]
OnStep = Callable[[State], None]

#: A residual that has grown by this much, relative to the right-hand side, comes back no more.
DIVERGED = 1e3
#: Bytes of vectors that are worked on at a time.
PIECE_BYTES = 64 << 20
#: What to do about a matrix that is not positive definite; the solvers do not know which curvature it is.
WAY_OUT = 'raise the damping or, if it is a Hessian, take curvature = "ggn"'


@dataclass(frozen=True)
class System:
    """(C + damping) x = b for every query.

    product: C v. damping: scalar () or (D,), in the units of the curvature. right: b, (query, D). examples: N, over which C is a mean.
    first: the id of the first query, for messages.
    """

    product: Product
    damping: Tensor
    right: Tensor
    examples: int
    first: int = 0

    def apply(self, x: Tensor, ids: Sequence[int] | None = None) -> Tensor:
        """(C + damping) x for x (query, D), with C the mean over examples `ids`, or over all."""
        return self.product(x, ids).addcmul_(self.damping.to(x), x)

    def residual(self, x: Tensor, ids: Sequence[int] | None = None, queries: Tensor | None = None) -> Tensor:
        """b - (C + damping) x for x (some queries, D); queries: which ones, as indices or a mask; None: all."""
        return self.apply(x, ids).neg_().add_(self.right if queries is None else self.right[queries])

    @cached_property
    def scale(self) -> Tensor:
        """||b|| per query, (query,); 1 where b is 0, whose solution is 0. Raises InputError where it is not finite."""
        norms = lengths(self.right)
        bad = ~torch.isfinite(norms)
        if bool(bad.any()):
            query = int(bad.nonzero()[0])
            raise InputError(
                f"the gradient of query {self.first + query} has the norm {float(norms[query])}; mend the query or the model's outputs"
            )
        return torch.where(norms > 0, norms, 1.0)

    def relative(self, r: Tensor) -> Tensor:
        """||r|| / ||b|| of residuals r of all queries, (query,). Raises InputError where it is not finite."""
        found = lengths(r) / self.scale
        bad = ~torch.isfinite(found)
        if bool(bad.any()):
            raise InputError(overflow("C + damping", f"of query {self.first + int(bad.nonzero()[0])}", r))
        return found


def overflow(what: str, whose: str, values: Tensor) -> str:
    """What to say where products are not finite."""
    wider = "" if values.dtype == torch.float64 else ', or dtype = "float64"'
    return f"products of {what} with the vectors {whose} are not finite; mend the model, whose derivatives overflow{wider}"


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


class Trace:
    """Residuals (K, query) and evaluations (K,) as they come, in memory that doubles where it is full; from a state's, if there is one."""

    def __init__(self, queries: int, like: Tensor, state: State | None = None) -> None:
        self._count = 0 if state is None else len(state["residuals"])
        room = max(16, 2 * self._count)
        self._residuals = like.new_zeros(room, queries)
        self._evaluations = torch.zeros(room, dtype=torch.float64)
        if state is not None:
            self._residuals[: self._count], self._evaluations[: self._count] = state["residuals"], state["evaluations"]

    def __len__(self) -> int:
        return self._count

    @property
    def first(self) -> Tensor:
        """Residuals (query,) of the first moment."""
        return self._residuals[0]

    @property
    def last(self) -> Tensor:
        """Residuals (query,) of the last moment."""
        return self._residuals[self._count - 1]

    @property
    def spent(self) -> float:
        """Evaluations by the last moment; 0 before any."""
        return float(self._evaluations[self._count - 1]) if self._count else 0.0

    def add(self, residual: Tensor, evaluations: float) -> None:
        """A moment: residuals (query,), and what one query has cost so far."""
        if self._count == len(self._residuals):
            self._residuals = torch.cat([self._residuals, torch.zeros_like(self._residuals)])
            self._evaluations = torch.cat([self._evaluations, torch.zeros_like(self._evaluations)])
        self._residuals[self._count], self._evaluations[self._count] = residual, evaluations
        self._count += 1

    def add_some(self, residual: Tensor, ids: Tensor, evaluations: float) -> None:
        """A moment of the queries `ids`; the others keep their last residuals, or 0."""
        whole = self.last.clone() if self._count else torch.zeros_like(self._residuals[0])
        whole[ids] = residual
        self.add(whole, evaluations)

    def state(self) -> State:
        """As tensors, which later moments do not change."""
        return {"residuals": self._residuals[: self._count], "evaluations": self._evaluations[: self._count]}

    def solution(self, x: Tensor, steps: int, tolerance: float) -> Solution:
        """The solution whose last residuals are the trace's."""
        told = self.state()
        return Solution(x, told["residuals"].clone(), told["evaluations"].clone(), steps, self.last <= tolerance)


def lengths(vectors: Tensor) -> Tensor:
    """||v|| per query, (query,)."""
    found: Tensor = torch.linalg.vector_norm(vectors, dim=1)
    return found


def inner(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> per query, (query,)."""
    step = pieces(a)
    return torch.cat([torch.linalg.vecdot(x, y) for x, y in zip(a.split(step), b.split(step), strict=True)])


def pieces(vectors: Tensor) -> int:
    """How many of some vectors (query, D) are worked on at a time where what is between them and the result is as large as they are."""
    return max(1, PIECE_BYTES // max(1, vectors[:1].nbytes))


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
