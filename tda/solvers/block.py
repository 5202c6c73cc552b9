"""Conjugate gradients that let the queries help each other: every query's solution is sought in the span of all queries' directions.

The curvature's few hundred large eigenvalues are what a solver has to learn, and they are the same for every query. With Q right-hand
sides a block method learns them about Q at a time, so that it needs several times fewer products than Q separate solves. The variant
is the one that survives dependent directions (Ji & Li 2017): they are made orthonormal at every step, and what depends is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tda.errors import InputError
from tda.solvers.cg import ROUNDING, WORTHWHILE, farthest
from tda.solvers.system import WAY_OUT, OnStep, Precondition, Solution, State, System, Trace, goal, lengths, overflow


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

    start (query, D): where to begin, used up; zero by default. A step minimises the energy of every query's error over as many
    directions as there are queries under way. Queries that have converged add no directions. Products are counted as shared out among
    the queries. The last check, state and on_step as in `conjugate_gradients`; memory: five vectors per query besides b.
    Raises InputError where C + damping is not positive definite.
    """
    path = _Path(system, precondition, tolerance, _begin(system, start) if state is None else state)
    if state is None:
        path.aim(path.trace.last > tolerance)
    del state
    while path.step < max_steps and path.is_going():
        path.advance()
        if not path.is_going():
            path.check()
        if on_step is not None:
            on_step(path.state())
    if path.is_going():
        path.check()
    return path.trace.solution(path.x, path.step, tolerance)


def _begin(system: System, start: Tensor | None) -> State:
    """From `start`, with the residuals of all queries, and no directions yet."""
    b = system.right
    x = torch.zeros_like(b) if start is None else start
    r = b.clone() if start is None else system.residual(x)
    trace = Trace(len(b), b)
    trace.add(system.relative(r), 0.0 if start is None else system.examples)
    none = torch.zeros(len(b), dtype=torch.bool, device=b.device)
    known = {"checked": torch.full_like(system.scale, torch.inf), "largest": torch.tensor(0.0), "step": torch.tensor(0)}
    return {"x": x, "r": r, "p": r[:0], "live": none, **known, **trace.state()}


class _Path:
    """The vectors x and r (residual) of all queries, (query, D), and orthonormal directions p (direction, D); live: queries under way.

    checked: the relative residual when it was last computed from x. largest: of ||(C + damping) v|| / ||v|| over all v seen. The
    vectors are changed in place.
    """

    def __init__(self, system: System, precondition: Precondition, tolerance: float, state: State) -> None:
        self.system, self.precondition, self.tolerance = system, precondition, tolerance
        self.x, self.r, self.p, self.live, self.checked = (state[name] for name in ("x", "r", "p", "live", "checked"))
        self.step, self.largest, self.trace = int(state["step"]), float(state["largest"]), Trace(len(self.x), self.x, state)

    def is_going(self) -> bool:
        """Whether a query is under way."""
        return bool(self.live.any())

    def state(self) -> State:
        """All of it as tensors."""
        vectors = {"x": self.x, "r": self.r, "p": self.p, "live": self.live, "checked": self.checked}
        return {
            **vectors,
            "largest": torch.tensor(self.largest, dtype=torch.float64),
            "step": torch.tensor(self.step),
            **self.trace.state(),
        }

    def aim(self, live: Tensor) -> None:
        """Begin again from the residuals of the queries in the mask `live`."""
        self.live, self.p = live, self.x[:0]
        if self.is_going():
            self._follow(self._preconditioned())

    def advance(self) -> None:
        """One step: the best x over the directions p, and the directions that follow."""
        system, p, trace = self.system, self.p, self.trace
        q = system.apply(p)
        solve = self._energy(q)
        length = solve((p @ self.r.T).double())
        # ||q^T length||, by which the residuals move
        moved = ((q @ q.T).double() @ length).mul_(length).sum(0).clamp(min=0).sqrt()
        known = moved <= farthest(system, trace)
        length = torch.where(known, length, 0.0).to(p)
        self.x.addmm_(length.T, p)
        self.r.addmm_(length.T, q, alpha=-1)
        trace.add(lengths(self.r) / system.scale, trace.spent + system.examples * len(p) / len(self.x))
        self.step += 1
        self.live = self.live & known & (trace.last > goal(self.tolerance, self.checked)) & length.any()
        if self.is_going():
            z = self._preconditioned()
            z.addmm_(solve((q @ z.T).double()).to(p).T, p, alpha=-1)
            del p, q
            self._follow(z)

    def check(self) -> None:
        """Compute the residuals from x; queries that are not there yet, and still gain from it, begin again from them."""
        self.r = self.p = self.x[:0]
        self.r = self.system.residual(self.x)
        self.trace.add(self.system.relative(self.r), self.trace.spent + self.system.examples)
        now, before = self.trace.last.clone(), self.checked
        self.checked = now
        self.aim((now > self.tolerance) & (now < WORTHWHILE * before))

    def _preconditioned(self) -> Tensor:
        """P^-1 r of the queries under way, a new tensor."""
        r = self.r if bool(self.live.all()) else self.r[self.live]
        z = self.precondition(r)
        return z.clone() if z is self.r else z

    def _follow(self, z: Tensor) -> None:
        """The directions z, made orthonormal, are the next; where they are nothing but rounding, no query is under way any more."""
        self.p = self.x[:0]
        self.p = _orthonormal(z)
        if not len(self.p):
            self.live = torch.zeros_like(self.live)

    def _energy(self, q: Tensor) -> Callable[[Tensor], Tensor]:
        """Solves with p (C + damping) p^T, (direction, direction), for float64 columns; 0 along what is nothing but rounding of it."""
        energy, stretched = (self.p @ q.T).double(), float(lengths(q).max())
        whose = f"of queries {self.system.first} to {self.system.first + len(self.x) - 1}"
        if not math.isfinite(stretched):
            raise InputError(overflow("C + damping", whose, q))
        self.largest = max(self.largest, stretched)
        energy = (energy + energy.T) / 2
        root, failed = torch.linalg.cholesky_ex(energy)
        if not int(failed):
            return lambda columns: torch.cholesky_solve(columns, root)
        values, basis = torch.linalg.eigh(energy)
        precision = torch.finfo(q.dtype).eps
        if float(values[0]) < -ROUNDING * len(q) ** 0.5 * precision * self.largest:
            raise InputError(
                f"C + damping is not positive definite: v^T M v / v^T v = {float(values[0]):.3g} along a search direction "
                f"{whose}; {WAY_OUT}"
            )
        kept = values > precision * stretched
        values, basis = values[kept, None], basis[:, kept]
        return lambda columns: basis @ ((basis.T @ columns) / values)


def _orthonormal(vectors: Tensor) -> Tensor:
    """An orthonormal basis (direction, D) of the span of vectors (query, D); what depends on the others, but for rounding, is left out.

    Changes the vectors.
    """
    norms = lengths(vectors)
    unit = vectors.div_(torch.where(norms > 0, norms, 1.0)[:, None])
    values, basis = torch.linalg.eigh((unit @ unit.T).double())
    kept = values > values[-1] * len(values) * 10 * torch.finfo(vectors.dtype).eps
    found: Tensor = (basis[:, kept] / values[kept].sqrt()).T.to(vectors) @ unit
    return found
