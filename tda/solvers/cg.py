"""Conjugate gradients for many right-hand sides at once, preconditioned or not."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tda.errors import InputError
from tda.solvers.system import WAY_OUT, OnStep, Precondition, Solution, State, System, Trace, goal, inner, lengths, overflow

#: A restart must bring the true residual down to this share, or the precision of the numbers is what stands in the way.
WORTHWHILE = 0.1
#: Products within this many units of rounding of 0 say nothing of their sign.
ROUNDING = 10


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
    can no longer be reduced in its precision, as where the matrix is singular, ends with `converged` False.
    state: of an earlier call with the same arguments, which is gone on with bit for bit and used up; on_step is given it after every
    step. Memory: x, residual, search direction, and a product or the preconditioned residual, four vectors per query besides b.
    Raises InputError where C + damping is not positive definite, naming the query.
    """
    path = _Path(system, precondition, tolerance, _begin(system, start) if state is None else state)
    if state is None:
        path.aim(path.trace.last > tolerance)
    del state
    while path.step < max_steps and len(path.ids):
        path.advance()
        if not len(path.ids):
            path.check()
        if on_step is not None:
            on_step(path.state())
    if len(path.ids):
        path.check()
    return path.trace.solution(path.x, path.step, tolerance)


def _begin(system: System, start: Tensor | None) -> State:
    """From `start`, with the residuals of all queries, and no search directions yet."""
    b = system.right
    x = torch.zeros_like(b) if start is None else start.clone()
    r = b.clone() if start is None else system.residual(x)
    trace = Trace(len(b), b)
    trace.add(system.relative(r), 0.0 if start is None else system.examples)
    every = torch.ones(len(b), dtype=torch.bool, device=b.device)
    known = {"checked": torch.full_like(system.scale, torch.inf), "largest": torch.tensor(0.0), "step": torch.tensor(0)}
    return {"x": x, "r": r, "p": r[:0], "r_z": b.new_zeros(len(b)), "live": every, **known, **trace.state()}


class _Path:
    """The vectors x (query, D), and of the queries under way (ids) r (residual) and p (search direction), (live, D), r_z = <r, P^-1 r>.

    checked: the relative residual when it was last computed from x. largest: of ||(C + damping) v|| / ||v|| over all v seen. All but
    the numbers is changed in place, for the vectors may be most of the memory that there is.
    """

    def __init__(self, system: System, precondition: Precondition | None, tolerance: float, state: State) -> None:
        self.system, self.precondition, self.tolerance = system, precondition, tolerance
        self.x, self.r, self.p, self.r_z, self.checked = (state[name] for name in ("x", "r", "p", "r_z", "checked"))
        self.ids, self.step, self.largest = state["live"].nonzero()[:, 0], int(state["step"]), float(state["largest"])
        self.trace = Trace(len(self.x), self.x, state)

    def state(self) -> State:
        """All of it as tensors."""
        live = torch.zeros(len(self.x), dtype=torch.bool, device=self.x.device)
        live[self.ids] = True
        vectors = {"x": self.x, "r": self.r, "p": self.p, "r_z": self.r_z, "live": live, "checked": self.checked}
        return {
            **vectors,
            "largest": torch.tensor(self.largest, dtype=torch.float64),
            "step": torch.tensor(self.step),
            **self.trace.state(),
        }

    def aim(self, live: Tensor) -> None:
        """Begin again from the residuals r of all queries, with those in the mask `live`."""
        self.ids = live.nonzero()[:, 0]
        if not bool(live.all()):
            self.r = self.r[live]
        z = self._preconditioned()
        self.p, self.r_z = z.clone() if z is self.r else z, inner(self.r, z)
        self._keep(self._is_positive(z))

    def advance(self) -> None:
        """One step of every query under way."""
        system, ids, trace = self.system, self.ids, self.trace
        q = system.apply(self.p)
        length = self._length(q)
        self.r.addcmul_(q, -length[:, None])
        self.x.index_add_(0, ids, torch.mul(self.p, length[:, None], out=q))
        del q
        residual = lengths(self.r) / system.scale[ids]
        trace.add_some(residual, ids, trace.spent + system.examples)
        self.step += 1
        self._keep((length > 0) & (residual > goal(self.tolerance, self.checked[ids])))
        if len(self.ids):
            z = self._preconditioned()
            following = inner(self.r, z)
            self.p.mul_((following / self.r_z)[:, None]).add_(z)
            self.r_z = following
            self._keep(self._is_positive(z))

    def check(self) -> None:
        """Compute the residuals from x; queries that are not there yet, and still gain from it, go on from them."""
        self.r = self.p = self.x[:0]
        self.r = self.system.residual(self.x)
        self.trace.add(self.system.relative(self.r), self.trace.spent + self.system.examples)
        now, before = self.trace.last.clone(), self.checked
        self.checked = now
        self.aim((now > self.tolerance) & (now < WORTHWHILE * before))

    def _keep(self, going: Tensor) -> None:
        """Only the queries of a mask among those under way."""
        if not bool(going.all()):
            self.ids, self.r_z = self.ids[going], self.r_z[going]
            self.r = self.r[going]
            self.p = self.p[going]

    def _preconditioned(self) -> Tensor:
        return self.r if self.precondition is None or not len(self.r) else self.precondition(self.r)

    def _length(self, q: Tensor) -> Tensor:
        """How far to go along p, (live,), q being (C + damping) p; 0 where the precision does not tell, for such a query is given up."""
        norms, stretched, curved = lengths(self.p), lengths(q), inner(self.p, q)
        if len(norms):
            self.largest = max(self.largest, float((stretched / norms).max()))
        value = torch.where(torch.isfinite(stretched), curved / norms.square(), torch.nan)
        self._refuse(~(value >= -_rounding(q) * self.largest), value, "C + damping", "along a search direction")
        length = self.r_z / curved
        allowed = farthest(self.system, self.trace)[self.ids]
        return torch.where((curved > 0) & (length * stretched <= allowed), length, 0.0)

    def _is_positive(self, z: Tensor) -> Tensor:
        """Whether <r, z>, z = P^-1 r, is more than rounding: it is not where r lies in directions that P^-1 maps to 0."""
        size, square = lengths(self.r) * lengths(z), lengths(self.r).square()
        self._refuse(~(self.r_z >= -_rounding(z) * size), self.r_z / square, "the preconditioner", "for the residual")
        return self.r_z > _rounding(z) * size

    def _refuse(self, bad: Tensor, values: Tensor, what: str, where: str) -> None:
        """InputError naming the first query whose <v, M v> / <v, v> is negative, or not finite."""
        if bool(bad.any()):
            k = int(bad.nonzero()[0])
            query, value = self.system.first + int(self.ids[k]), float(values[k])
            if not math.isfinite(value):
                raise InputError(overflow(what, f"of query {query}", values))
            raise InputError(f"{what} is not positive definite: v^T M v / v^T v = {value:.3g} {where} of query {query}; {WAY_OUT}")


def farthest(system: System, trace: Trace) -> Tensor:
    """How far (query,) a step may move the residual of a query: what goes farther is along a direction that the precision loses.

    For ||r|| <= sqrt(sigma_max / sigma_min) ||r_0|| all the way, and 1 / precision is the most that the quotient can be.
    """
    most: float = torch.finfo(system.right.dtype).eps ** -0.5
    return system.scale * trace.first.clamp(min=1) * most


def _rounding(like: Tensor) -> float:
    return ROUNDING * torch.finfo(like.dtype).eps
