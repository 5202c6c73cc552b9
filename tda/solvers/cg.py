"""Conjugate gradients for many right-hand sides at once, preconditioned or not."""

from __future__ import annotations

import torch
from torch import Tensor

from tda.errors import InputError
from tda.solvers.system import OnStep, Precondition, Solution, State, System, Trace, goal, inner, lengths

#: A restart must bring the true residual down to this share, or the precision of the numbers is what stands in the way.
WORTHWHILE = 0.1


def conjugate_gradients(
    system: System,
    *,
    precondition: Precondition | None = None,
    start: Tensor | None = None,
    tolerance: float = 1e-6,
    max_steps: int = 1000,
    state: State | None = None,
    on_step: OnStep | None = None,
) -> Solution:
    """Solve (C + damping) x = b to ||b - (C + damping) x|| <= tolerance ||b|| for every query.

    start (query, D): where to begin; zero by default. Queries that have converged drop out of the products. The residual is carried
    along; where it says converged, the true one is computed, and the query goes on from there if it is not. A query whose residual
    can no longer be reduced in its precision ends with `converged` False.
    state: of an earlier call with the same arguments, which is gone on with bit for bit; on_step is given it after every step.
    Raises InputError where C + damping is not positive definite, naming the query.
    """
    path = _Path.begin(system, precondition, start, tolerance) if state is None else _Path(state)
    while int(path.state["step"]) < max_steps and bool(path.state["live"].any()):
        path.advance(system, precondition, tolerance)
        if not bool(path.state["live"].any()):
            path.check(system, precondition, tolerance)
        if on_step is not None:
            on_step(path.state)
    if bool(path.state["live"].any()):
        path.check(system, precondition, tolerance)
    return Trace.of(path.state).solution(path.state["x"], int(path.state["step"]), tolerance)


class _Path:
    """The vectors x, r (residual), z = P^-1 r, p (search direction), all (query, D), and which queries are still under way (live).

    r_z: <r, z>; checked: the relative residual when it was last computed from x. A state is never changed, only replaced.
    """

    def __init__(self, state: State) -> None:
        self.state = state

    @classmethod
    def begin(cls, system: System, precondition: Precondition | None, start: Tensor | None, tolerance: float) -> _Path:
        b = system.right
        x = torch.zeros_like(b) if start is None else start.clone()
        r = b.clone() if start is None else system.residual(x)
        trace = Trace()
        trace.add(lengths(r) / system.scale, 0.0 if start is None else system.examples)
        zeros = torch.zeros(len(b), dtype=b.dtype, device=b.device)
        path = cls({"x": x, "r": r, "p": torch.zeros_like(b), "r_z": zeros, "step": torch.zeros((), dtype=torch.int64), **trace.state()})
        return path._aim(precondition, trace.residuals[-1] > tolerance, torch.full_like(zeros, torch.inf))

    def _aim(self, precondition: Precondition | None, live: Tensor, checked: Tensor) -> _Path:
        """Begin again from the residuals of the queries `live`."""
        r, p, r_z = self.state["r"], self.state["p"].clone(), self.state["r_z"].clone()
        z = _apply(precondition, r[live])
        p[live], r_z[live] = z, _positive(inner(r[live], z), live, "the preconditioner", lengths(r[live]).square())
        self.state = {**self.state, "p": p, "r_z": r_z, "live": live, "checked": checked}
        return self

    def advance(self, system: System, precondition: Precondition | None, tolerance: float) -> None:
        """One step of every live query."""
        s = self.state
        live, trace = s["live"], Trace.of(s)
        x, r, p, r_z = (s[name].clone() for name in ("x", "r", "p", "r_z"))
        q = system.apply(p[live])
        curved = _positive(inner(p[live], q), live, "C + damping", lengths(p[live]).square())
        length = (r_z[live] / curved)[:, None]
        x[live] += length * p[live]
        r[live] -= length * q
        residual = trace.residuals[-1].clone()
        residual[live] = lengths(r[live]) / system.scale[live]
        trace.add(residual, trace.evaluations[-1] + system.examples)
        on = live & (residual > goal(tolerance, s["checked"]))
        z = _apply(precondition, r[on])
        following = _positive(inner(r[on], z), on, "the preconditioner", lengths(r[on]).square())
        p[on] = z + (following / r_z[on])[:, None] * p[on]
        r_z[on] = following
        self.state = {**s, "x": x, "r": r, "p": p, "r_z": r_z, "live": on, "step": s["step"] + 1, **trace.state()}

    def check(self, system: System, precondition: Precondition | None, tolerance: float) -> None:
        """Compute the residuals from x; queries that are not there yet, and still gain from it, go on from them."""
        r, trace = system.residual(self.state["x"]), Trace.of(self.state)
        trace.add(lengths(r) / system.scale, trace.evaluations[-1] + system.examples)
        now = trace.residuals[-1]
        self.state = {**self.state, "r": r, **trace.state()}
        self._aim(precondition, (now > tolerance) & (now < WORTHWHILE * self.state["checked"]), now)


def _apply(precondition: Precondition | None, r: Tensor) -> Tensor:
    return r.clone() if precondition is None or not len(r) else precondition(r)


def _positive(products: Tensor, queries: Tensor, what: str, squares: Tensor) -> Tensor:
    """The products <v, M v> of the queries in a mask, which must be positive; squares: ||v||^2."""
    bad = ~(products > 0)
    if bool(bad.any()):
        k = int(bad.nonzero()[0])
        query, value = int(queries.nonzero()[k]), float(products[k] / squares[k])
        raise InputError(
            f"{what} is not positive definite: v^T M v / v^T v = {value:.3g} along a search direction of query {query}; "
            'more damping, or curvature = "ggn", makes it so'
        )
    return products
