"""Methods that solve (C + lambda I) v = grad f_q with products of the curvature alone: nothing of size D^2 is ever made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator
from torch import Tensor

from tda.attributed import Attributed
from tda.curvature.eigen import Factor
from tda.curvature.fisher import Fisher
from tda.curvature.inverse import HEURISTIC
from tda.directions import Dense, Direction, dense
from tda.flat import flatten, unflatten
from tda.methods.options import SaneDamping
from tda.methods.shortened import Shortened
from tda.methods.work import Fit, Made, Work
from tda.solvers.astra import NAMED, Schedule, astra
from tda.solvers.cg import conjugate_gradients
from tda.solvers.operator import Curvature, Operator
from tda.solvers.preconditioner import ekfac_preconditioner
from tda.solvers.sni import neumann
from tda.solvers.system import Solution, System

BatchSize = int | Literal["full"]
ScheduleName = Literal["tuned", "paper", "paper-convnet", "paper-gpt2"]


class Iterative(Shortened):
    """influence[q, i] = -(1/N) g_q^T (C + lambda I)^-1 g_i, C the `curvature` of the mean loss over the training examples.

    damping: an absolute lambda, or "heuristic": 0.1 x the mean eigenvalue of the Fisher over all attributed parameters, known from the
    EK-FAC factors of `fisher` (as is the preconditioner of the methods that have one). tolerance: a solve ends for a query where
    ||g - (C + lambda I) v|| <= tolerance ||g||. max_steps: where it ends in any case; the residuals reached are stored with the run.
    """

    curvature: Curvature = "ggn"
    damping: SaneDamping = "heuristic"
    fisher: Fisher = "sampled"
    tolerance: float = Field(default=1e-4, gt=0, lt=1)
    exact: ClassVar[bool] = True

    @property
    def vectors(self) -> int:
        """Right-hand sides, solutions, residuals, search directions, products, and tangents on their way."""
        return 7

    @property
    def shares_passes(self) -> bool:
        """Every step of a solve is one."""
        return True

    def determining(self) -> dict[str, Any]:
        """Without the Fisher where no factors are needed."""
        return {name: value for name, value in super().determining().items() if name != "fisher" or self.fits}

    @property
    def preconditioned(self) -> bool:
        """Whether EK-FAC factors precondition the solve."""
        return False

    @property
    def fits(self) -> tuple[Fit, ...]:
        """EK-FAC factors, where they precondition or decide the damping."""
        return (Fit("kronecker", self.fisher),) if self.preconditioned or self.damping == "heuristic" else ()

    def damping_of(self, curvature: Sequence[Any]) -> float:
        """lambda, one for all parameters."""
        return heuristic_damping(curvature[0]) if self.damping == "heuristic" else float(self.damping)

    def directions(self, work: Work, gradients: Sequence[Direction]) -> Made:
        """V_q = -(C + lambda I)^-1 g_q, all queries solved together."""
        blocks, damping = work.attributed.blocks, self.damping_of(work.curvature)
        system = system_of(work.attributed, work, gradients, self.curvature, damping)
        precondition = ekfac_preconditioner(blocks, work.curvature[0], damping) if self.preconditioned else None
        solution = self.solve(system, precondition, work)
        return Made([[Dense(-matrix) for matrix in unflatten(blocks, solution.x)]], {"solves": [told(solution, self.tolerance)]})

    def solve(self, system: System, precondition: Callable[[Tensor], Tensor] | None, work: Work) -> Solution:
        """The solution of the system for all queries."""
        raise NotImplementedError


def system_of(attributed: Attributed, work: Work, gradients: Sequence[Direction], curvature: Curvature, damping: float) -> System:
    """(C + damping I) v = g for the gradients of all queries, with the curvature of a model over all training examples."""
    right = flatten(attributed.blocks, [dense(gradient) for gradient in gradients])
    operator = Operator(attributed, work.train, curvature, work.batch_size)
    return System(operator.product, right.new_full((), damping), right, len(work.train), work.first)


def heuristic_damping(factors: Sequence[Factor]) -> float:
    """0.1 x the mean eigenvalue of the Fisher over all blocks; its trace is the sum of EK-FAC's eigenvalues."""
    eigenvalues = [factor.eigenvalues for factor in factors if factor.eigenvalues is not None]
    return HEURISTIC * sum(float(e.double().sum()) for e in eigenvalues) / sum(e.numel() for e in eigenvalues)


def told(solution: Solution, tolerance: float) -> dict[str, Any]:
    """A solve as JSON: residual (step, query), evaluations (step,), converged (query,)."""
    return {
        "residual": solution.residuals.double().tolist(),
        "evaluations": solution.evaluations.double().tolist(),
        "converged": solution.converged.tolist(),
        "steps": int(solution.steps),
        "tolerance": tolerance,
    }


class CG(Iterative):
    """Conjugate gradients over all training examples. preconditioner: "none" or "ekfac"."""

    name: Literal["cg"] = "cg"
    max_steps: int = Field(default=1000, ge=1)
    preconditioner: Literal["none", "ekfac"] = "none"

    @property
    def preconditioned(self) -> bool:
        """Where the options say so."""
        return self.preconditioner == "ekfac"

    def solve(self, system: System, precondition: Callable[[Tensor], Tensor] | None, work: Work) -> Solution:
        """By conjugate gradients."""
        options: dict[str, Any] = {"tolerance": self.tolerance, "max_steps": self.max_steps, "state": work.state, "on_step": work.on_step}
        return conjugate_gradients(system, precondition=precondition, start=None, **options)


class SNI(Iterative):
    """Stochastic Neumann iterations (LiSSA): v <- v - alpha ((C_B + lambda I) v - g), B a mini-batch of `batch_size` examples.

    step_size: alpha; None: from the largest eigenvalue, by power iteration. repeats: runs with batches of their own, averaged.
    """

    name: Literal["sni"] = "sni"
    max_steps: int = Field(default=5000, ge=1)
    batch_size: BatchSize = 256
    step_size: float | None = Field(default=None, gt=0)
    repeats: int = Field(default=1, ge=1)

    @field_validator("batch_size", mode="before")
    @classmethod
    def _batch_is_a_size(cls, value: object) -> object:
        return batch_is_a_size(value)

    @property
    def stochastic(self) -> bool:
        """On mini-batches."""
        return self.batch_size != "full"

    def solve(self, system: System, precondition: Callable[[Tensor], Tensor] | None, work: Work) -> Solution:
        """By Neumann iterations."""
        size = None if self.batch_size == "full" else int(self.batch_size)
        options: dict[str, Any] = {"max_steps": self.max_steps, "tolerance": self.tolerance, "repeats": self.repeats, "seed": work.seed}
        return neumann(system, step_size=self.step_size, batch_size=size, state=work.state, on_step=work.on_step, **options)


class Astra(Iterative):
    """ASTRA: iterations that EK-FAC preconditions, started from its solution.

    schedule: "tuned", ours; or the paper's by name: "paper", "paper-convnet", "paper-gpt2". batch_size, max_steps, step_size and
    momentum replace parts of it. start: "ekfac" or "zero".
    """

    name: Literal["astra"] = "astra"
    schedule: ScheduleName = "tuned"
    batch_size: BatchSize | None = None
    max_steps: int | None = Field(default=None, ge=1)
    step_size: float | None = Field(default=None, gt=0)
    momentum: float | None = Field(default=None, ge=0, lt=1)
    start: Literal["ekfac", "zero"] = "ekfac"

    @field_validator("batch_size", mode="before")
    @classmethod
    def _batch_is_a_size(cls, value: object) -> object:
        return None if value is None else batch_is_a_size(value)

    @property
    def stochastic(self) -> bool:
        """By a schedule that takes mini-batches."""
        return self.planned().batch_size is not None

    @property
    def preconditioned(self) -> bool:
        """Always."""
        return True

    @model_validator(mode="after")
    def _schedule_is_sane(self) -> Self:
        planned = self.planned()
        if planned.of_damping is not None and self.damping == 0:
            raise ValueError(f'schedule = "{self.schedule}" takes steps that are a multiple of the damping, which is 0; give either')
        return self

    def planned(self) -> Schedule:
        """The schedule with what the options replace."""
        found = NAMED[self.schedule]
        if self.batch_size is not None:
            found = replace(found, batch_size=None if self.batch_size == "full" else int(self.batch_size))
        if self.max_steps is not None:
            found = replace(found, steps=self.max_steps)
        if self.step_size is not None:
            found = replace(found, step_size=self.step_size, of_damping=None)
        return found if self.momentum is None else replace(found, momentum=self.momentum)

    def solve(self, system: System, precondition: Callable[[Tensor], Tensor] | None, work: Work) -> Solution:
        """By preconditioned iterations."""
        assert precondition is not None
        options: dict[str, Any] = {"tolerance": self.tolerance, "seed": work.seed, "state": work.state, "on_step": work.on_step}
        return astra(system, precondition, schedule=self.planned(), start=self.start, **options)


def batch_is_a_size(value: object) -> object:
    """The value, where it is "full" or a whole number of at least 1; ValueError else."""
    if value == "full" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError(f'batch_size must be "full" or a whole number of at least 1, got {value!r}')
