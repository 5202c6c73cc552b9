"""Conjugate gradients that let the queries help each other: every query's solution is sought in the span of all queries' directions.

The curvature's few hundred large eigenvalues are what a solver has to learn, and they are the same for every query. With Q right-hand
sides a block method learns them about Q at a time, so that it needs several times fewer products than Q separate solves. The variant
is the one that survives dependent directions (Ji & Li 2017): they are made orthonormal at every step, and what depends is dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tda.errors import InputError
from tda.solvers.cg import WORTHWHILE
from tda.solvers.system import OnStep, Precondition, Solution, State, System, Trace, goal, lengths


def block_conjugate_gradients(
    system: System,
    precondition: Precondition,
    *,
    start: Tensor | None = None,
    tolerance: float = 1e-4,
    max_steps: int = 200,
    state: State | None = None,
    on_step: OnStep | None = None,
) -> Solution:
    """Solve (C + damping) x = b to ||b - (C + damping) x|| <= tolerance ||b|| for every query, all in one Krylov space.

    start (query, D): where to begin; zero by default. A step minimises the energy of every query's error over as many directions as
    there are queries under way. Queries that have converged add no directions. Products are counted as shared out among the queries.
    The last check, state and on_step as in `conjugate_gradients`. Raises InputError where C + damping is not positive definite.
    """
    state = _begin(system, precondition, start, tolerance) if state is None else state
    while int(state["step"]) < max_steps and bool(state["live"].any()):
        state = _advance(system, precondition, state, tolerance)
        if not bool(state["live"].any()):
            state = _check(system, precondition, state, tolerance)
        if on_step is not None:
            on_step(state)
    if bool(state["live"].any()):
        state = _check(system, precondition, state, tolerance)
    return Trace.of(state).solution(state["x"], int(state["step"]), tolerance)


def _begin(system: System, precondition: Precondition, start: Tensor | None, tolerance: float) -> State:
    b, trace = system.right, Trace()
    x = torch.zeros_like(b) if start is None else start.clone()
    r = b.clone() if start is None else system.residual(x)
    trace.add(lengths(r) / system.scale, 0.0 if start is None else system.examples)
    live = trace.residuals[-1] > tolerance
    p = _orthonormal(precondition(r[live])) if bool(live.any()) else r[:0]
    step = torch.zeros((), dtype=torch.int64)
    return {"x": x, "r": r, "p": p, "live": live, "step": step, "checked": torch.full_like(lengths(b), torch.inf), **trace.state()}


def _advance(system: System, precondition: Precondition, state: State, tolerance: float) -> State:
    """One step: the best x over the directions p (direction, D), and the directions that follow."""
    p, trace = state["p"], Trace.of(state)
    q = system.apply(p)
    root = _root(p @ q.T)
    length = torch.cholesky_solve(p @ state["r"].T, root)
    x, r = state["x"] + length.T @ p, state["r"] - length.T @ q
    trace.add(lengths(r) / system.scale, trace.evaluations[-1] + system.examples * len(p) / len(x))
    live = state["live"] & (trace.residuals[-1] > goal(tolerance, state["checked"]))
    if bool(live.any()):
        z = precondition(r[live])
        p = _orthonormal(z - torch.cholesky_solve(q @ z.T, root).T @ p)
    return {**state, "x": x, "r": r, "p": p, "live": live, "step": state["step"] + 1, **trace.state()}


def _check(system: System, precondition: Precondition, state: State, tolerance: float) -> State:
    """Compute the residuals from x; queries that are not there yet, and still gain from it, begin again from them."""
    r, trace = system.residual(state["x"]), Trace.of(state)
    trace.add(lengths(r) / system.scale, trace.evaluations[-1] + system.examples)
    now = trace.residuals[-1]
    live = (now > tolerance) & (now < WORTHWHILE * state["checked"])
    p = _orthonormal(precondition(r[live])) if bool(live.any()) else state["p"]
    return {**state, "r": r, "p": p, "live": live, "checked": now, **trace.state()}


def _orthonormal(vectors: Tensor) -> Tensor:
    """An orthonormal basis (direction, D) of the span of vectors (query, D); what depends on the others, but for rounding, is left out."""
    unit = vectors / lengths(vectors)[:, None]
    values, basis = torch.linalg.eigh((unit @ unit.T).double())
    kept = values > values[-1] * len(values) * 10 * torch.finfo(vectors.dtype).eps
    found: Tensor = (basis[:, kept] / values[kept].sqrt()).T.to(vectors) @ unit
    return found


def _root(energy: Tensor) -> Tensor:
    """Cholesky factor of P^T (C + damping) P."""
    energy = (energy + energy.T) / 2
    root: Tensor
    root, failed = torch.linalg.cholesky_ex(energy)
    if int(failed):
        least = float(torch.linalg.eigvalsh(energy.double())[0])
        raise InputError(
            f"C + damping is not positive definite: v^T M v / v^T v = {least:.3g} along a search direction; "
            'more damping, or curvature = "ggn", makes it so'
        )
    return root
