"""The iteration that SNI and ASTRA share: x <- x + alpha_k u, u <- momentum u + P^-1 (b - (C_B + damping) x), B a batch of examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tda.errors import InputError
from tda.solvers.cg import ROUNDING
from tda.solvers.power import extreme_eigenvalues
from tda.solvers.system import DIVERGED, WAY_OUT, OnStep, Precondition, Solution, State, System, Trace, lengths, mini_batch, overflow

#: The largest eigenvalue is found from below: by so much less than its inverse a step is.
MARGIN = 1.05
#: Mini-batches whose largest eigenvalues decide a step size, because one batch's can be larger than the mean's.
SAMPLED_BATCHES = 4
#: With mini-batches, the residual over all examples is computed each time that this many passes over them have been spent.
CHECKED_PASSES = 5

Stated = Literal["step_size", "schedule", "found"]


@dataclass(frozen=True)
class Descent:
    """How to step. name: of the solver, for messages. step_size: alpha_k of step k. batch_size: None for all examples.

    steps: at most. seed, first: of the mini-batches, and where in their sequence the first step is. stated: where alpha is from: an
    option, a schedule that ties it to the damping, or `safe_step`.
    """

    name: str
    step_size: Callable[[int], float]
    momentum: float
    batch_size: int | None
    steps: int
    seed: int
    first: int = 0
    stated: Stated = "found"


def safe_step(system: System, precondition: Precondition | None, batch_size: int | None, seed: int) -> tuple[float, float]:
    """(1 / (1.05 sigma_max), evaluations it cost per query), sigma_max the largest eigenvalue of P^-1 (C_B + damping) over some batches."""
    batches = [mini_batch(system.examples, batch_size, seed, k) for k in range(SAMPLED_BATCHES)]
    if batches[0] is None:
        batches = [None]
    sigmas, spent = [], 0
    for ids in batches:
        sigma, products = _sigma(system, precondition, ids)
        sigmas.append(sigma)
        spent += products * (system.examples if ids is None else len(ids))
    return 1 / (MARGIN * max(sigmas)), spent / max(1, len(system.right))


def _sigma(system: System, precondition: Precondition | None, ids: Sequence[int] | None) -> tuple[float, int]:
    _, sigma, products = _extremes(system, precondition, ids)
    if not sigma > 0:
        raise InputError(f"the largest eigenvalue of C + damping is {sigma:.3g}, not positive; {WAY_OUT}")
    return sigma, products


def _extremes(system: System, precondition: Precondition | None, ids: Sequence[int] | None) -> tuple[float, float, int]:
    right = system.right
    least, largest, products = extreme_eigenvalues(
        lambda v: system.apply(v, ids), right.shape[1], precondition=precondition, like=right[:0]
    )
    if math.isnan(largest):
        raise InputError(overflow("C + damping", "of its largest eigenvalue", right))
    return least, largest, products


def descend(
    system: System,
    plan: Descent,
    precondition: Precondition | None,
    start: Tensor | None,
    *,
    spent: float,
    tolerance: float,
    state: State | None,
    on_step: OnStep | None,
) -> Solution:
    """Iterate from `start` (query, D) until every query's residual over all examples is within `tolerance` of ||b||, or to plan.steps.

    start: zero where there is none; it is used up, as is a state. spent: evaluations per query before the first step. With full batches,
    queries that are there drop out. Memory: x, u where there is momentum, the residual and what P^-1 makes of it.
    Raises InputError where the iteration diverges, naming the step and what would do.
    """
    if state is None:
        state = _begin(torch.zeros_like(system.right) if start is None else start, plan)
    path = _Path(system, plan, precondition, spent, state)
    del state, start
    while path.step < plan.steps and len(path.ids):
        path.advance(tolerance)
        if on_step is not None:
            on_step(path.state())
    if not path.exact:
        path.add_full()
    return path.trace.solution(path.x, path.step, tolerance)


def _begin(start: Tensor, plan: Descent) -> State:
    live = torch.ones(len(start), dtype=torch.bool, device=start.device)
    velocity = {"u": torch.zeros_like(start)} if plan.momentum else {}
    return {"x": start, **velocity, "live": live, "step": torch.tensor(0), "exact": torch.tensor(False)}


class _Path:
    """The vectors x (query, D) and, where there is momentum, u (live, D), of the queries under way (ids), changed in place.

    exact: whether the last residuals are of x, and over all examples.
    """

    def __init__(self, system: System, plan: Descent, precondition: Precondition | None, spent: float, state: State) -> None:
        self.system, self.plan, self.precondition, self._before = system, plan, precondition, spent
        self.x, self.u, self.ids = state["x"], state.get("u"), state["live"].nonzero()[:, 0]
        self.step, self.exact = int(state["step"]), bool(state["exact"])
        self.trace = Trace(len(self.x), self.x, state if "residuals" in state else None)

    def state(self) -> State:
        """All of it as tensors."""
        live = torch.zeros(len(self.x), dtype=torch.bool, device=self.x.device)
        live[self.ids] = True
        velocity = {} if self.u is None else {"u": self.u}
        return {
            "x": self.x,
            **velocity,
            "live": live,
            "step": torch.tensor(self.step),
            "exact": torch.tensor(self.exact),
            **self.trace.state(),
        }

    def advance(self, tolerance: float) -> None:
        """One step of every query under way."""
        system, plan, k = self.system, self.plan, self.step
        batch = mini_batch(system.examples, plan.batch_size, plan.seed, plan.first + k)
        some = None if len(self.ids) == len(self.x) else self.ids
        r = system.residual(self.x if some is None else self.x[some], batch, some)
        spent = self._spent() + (system.examples if batch is None else len(batch))
        self.trace.add_some(lengths(r) / system.scale[self.ids], self.ids, spent)
        self._check_growth()
        if batch is None:
            r = self._keep(self.trace.last[self.ids] > tolerance, r)
        if len(self.ids):
            self._move(r if self.precondition is None else self.precondition(r), plan.step_size(k))
        self.step += 1
        if batch is not None and _is_checkpoint(system, plan, k):
            self.add_full()
            if not bool((self.trace.last > tolerance).any()):
                self.ids = self.ids[:0]
        self.exact = not len(self.ids)

    def add_full(self) -> None:
        """The residuals over all examples."""
        self.trace.add(lengths(self.system.residual(self.x)) / self.system.scale, self._spent() + self.system.examples)
        self._check_growth()

    def _spent(self) -> float:
        return self.trace.spent if len(self.trace) else self._before

    def _keep(self, going: Tensor, r: Tensor) -> Tensor:
        """Only the queries of a mask among those under way; their residuals."""
        if bool(going.all()):
            return r
        self.ids = self.ids[going]
        if self.u is not None:
            self.u = self.u[going]
        return r[going]

    def _move(self, z: Tensor, alpha: float) -> None:
        if self.u is not None:
            z = self.u.mul_(self.plan.momentum).add_(z)
        self.x.index_add_(0, self.ids, z, alpha=alpha)

    def _check_growth(self) -> None:
        """InputError where a residual, over all examples or a batch, is not finite or comes back no more."""
        residual = self.trace.last
        bad = ~(residual <= DIVERGED * self.trace.first.clamp(min=1))
        if bool(bad.any()):
            query = int(bad.nonzero()[0])
            way_out = _way_out(self.system, self.plan, self.precondition)
            raise InputError(
                f"{self.plan.name} diverged at step {self.step}: the relative residual of query {self.system.first + query} is "
                f"{float(residual[query]):.3g}; {way_out}"
            )


def _is_checkpoint(system: System, plan: Descent, k: int) -> bool:
    assert plan.batch_size is not None
    return (k + 1) % (CHECKED_PASSES * (system.examples // plan.batch_size)) == 0


def _way_out(system: System, plan: Descent, precondition: Precondition | None) -> str:
    """Why an iteration may have diverged, and what would do."""
    least, largest, _ = _extremes(system, precondition, None)
    indefinite = f"C + damping is not positive definite, and no step size would do; {WAY_OUT}"
    if least < -ROUNDING * torch.finfo(system.right.dtype).eps * largest:
        return indefinite
    good, _ = safe_step(system, precondition, plan.batch_size, plan.seed)
    alpha = plan.step_size(0)
    if alpha > good and plan.stated == "step_size":
        return f"step_size = {alpha:.3g} is too large, {good:.2g} would do"
    if alpha > good and plan.stated == "schedule":
        return (
            f"the schedule's steps follow from the damping, and {alpha:.2g} is too large where {good:.2g} would do; "
            'lower the damping, or choose schedule = "tuned"'
        )
    if plan.batch_size is not None and plan.batch_size < system.examples:
        return f"mini-batches of {plan.batch_size} examples differ too much; raise batch_size or the damping"
    return indefinite
