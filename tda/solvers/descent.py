"""The iteration that SNI and ASTRA share: x <- x + alpha_k u, u <- momentum u + P^-1 (b - (C_B + damping) x), B a batch of examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tda.errors import InputError
from tda.solvers.power import largest_eigenvalue
from tda.solvers.system import DIVERGED, OnStep, Precondition, Solution, State, System, Trace, lengths, mini_batch

#: The largest eigenvalue is found from below: by so much less than its inverse a step is.
MARGIN = 1.05
#: Mini-batches whose largest eigenvalues decide a step size, because one batch's can be larger than the mean's.
SAMPLED_BATCHES = 4
#: With mini-batches, the residual over all examples is computed each time that this many passes over them have been spent.
CHECKED_PASSES = 5


@dataclass(frozen=True)
class Descent:
    """How to step. name: of the solver, for messages. step_size: alpha_k of step k. batch_size: None for all examples.

    steps: at most. seed, first: of the mini-batches, and where in their sequence the first step is.
    """

    name: str
    step_size: Callable[[int], float]
    momentum: float
    batch_size: int | None
    steps: int
    seed: int
    first: int = 0


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
    sigma, products = largest_eigenvalue(
        lambda v: system.apply(v, ids), system.right.shape[1], precondition=precondition, like=system.right[:0]
    )
    if not sigma > 0:
        raise InputError(f'the largest eigenvalue of C + damping is {sigma:.3g}, not positive; use curvature = "ggn" or more damping')
    return sigma, products


def descend(
    system: System,
    plan: Descent,
    precondition: Precondition | None,
    start: Tensor,
    *,
    spent: float,
    tolerance: float,
    state: State | None,
    on_step: OnStep | None,
) -> Solution:
    """Iterate from `start` (query, D) until every query's residual over all examples is within `tolerance` of ||b||, or to plan.steps.

    spent: evaluations per query before the first step. With full batches, queries that are there drop out. Raises InputError naming the
    step and a step size that would do where the iteration diverges.
    """
    state = _begin(start) if state is None else state
    trace = Trace.of(state) if "residuals" in state else Trace()
    while int(state["step"]) < plan.steps and bool(state["live"].any()):
        k = int(state["step"])
        ids = mini_batch(system.examples, plan.batch_size, plan.seed, plan.first + k)
        x, u, live = state["x"], state["u"], state["live"].clone()
        r = system.residual(x[live], ids, live)
        spent = (trace.evaluations[-1] if trace.evaluations else spent) + (system.examples if ids is None else len(ids))
        trace.add(_filled(trace, lengths(r) / system.scale[live], live), spent)
        _check_growth(system, plan, precondition, trace, k)
        if ids is None:
            going = trace.residuals[-1][live] > tolerance
            r, live[live.clone()] = r[going], going
        if bool(live.any()):
            x, u = x.clone(), u.clone()
            u[live] = plan.momentum * u[live] + (r if precondition is None else precondition(r))
            x[live] += plan.step_size(k) * u[live]
        if ids is not None and _is_checkpoint(system, plan, k):
            _add_full(system, trace, x, spent)
            live &= bool((trace.residuals[-1] > tolerance).any())
        exact = torch.tensor(not bool(live.any()))
        state = {"x": x, "u": u, "live": live, "step": state["step"] + 1, "exact": exact, **trace.state()}
        if on_step is not None:
            on_step(state)
    if not bool(state["exact"]):
        _add_full(system, trace, state["x"], spent)
    return trace.solution(state["x"], int(state["step"]), tolerance)


def _begin(start: Tensor) -> State:
    live = torch.ones(len(start), dtype=torch.bool, device=start.device)
    step, exact = torch.zeros((), dtype=torch.int64), torch.tensor(False)
    return {"x": start.clone(), "u": torch.zeros_like(start), "live": live, "step": step, "exact": exact}


def _filled(trace: Trace, residual: Tensor, live: Tensor) -> Tensor:
    """The residuals of all queries: the last ones where a query has dropped out."""
    if bool(live.all()):
        return residual
    whole = trace.residuals[-1].clone()
    whole[live] = residual
    return whole


def _is_checkpoint(system: System, plan: Descent, k: int) -> bool:
    assert plan.batch_size is not None
    return (k + 1) % (CHECKED_PASSES * (system.examples // plan.batch_size)) == 0


def _add_full(system: System, trace: Trace, x: Tensor, spent: float) -> None:
    """The residuals over all examples; spent: evaluations so far, where the trace does not say."""
    before = trace.evaluations[-1] if trace.evaluations else spent
    trace.add(lengths(system.residual(x)) / system.scale, before + system.examples)


def _check_growth(system: System, plan: Descent, precondition: Precondition | None, trace: Trace, k: int) -> None:
    residual = trace.residuals[-1]
    bad = ~(residual <= DIVERGED * trace.residuals[0].clamp(min=1))
    if bool(bad.any()):
        query = int(bad.nonzero()[0])
        good, _ = safe_step(system, precondition, plan.batch_size, plan.seed)
        raise InputError(
            f"{plan.name} diverged at step {k}: the relative residual of query {query} is {float(residual[query]):.3g}; "
            f"step_size = {plan.step_size(k):.3g} is too large, {good:.2g} would do"
        )
