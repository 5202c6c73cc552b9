"""ASTRA-SOURCE: SOURCE whose responses are solved for, with EK-FAC as the preconditioner (2507.14740)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from tda.directions import Dense, Direction
from tda.errors import InputError
from tda.flat import unflatten
from tda.methods.iterative import BatchSize, ScheduleName, batch_is_a_size, system_of, told
from tda.methods.source import FastSource
from tda.methods.work import Made, Work
from tda.solvers.astra import NAMED, Schedule, astra
from tda.solvers.preconditioner import ekfac_preconditioner
from tda.solvers.system import OnStep, Solution, State


class AstraSource(FastSource):
    """FAST-SOURCE with R_l replaced by (G_l + lambda_l I)^-1, lambda_l = 1 / t_l + damping, G_l the GGN at the segment's mean weights.

    Both are t_l along flat directions and 1/s along steep ones. S_l stays EK-FAC's. Solved by ASTRA, each segment's EK-FAC at damping
    lambda_l being the preconditioner. schedule: by name, as for astra; batch_size: of its steps, in place of the schedule's. tolerance:
    a solve ends where ||g - (G + lambda I) v|| <= tolerance ||g||.
    """

    name: Literal["astra_source"] = "astra_source"  # type: ignore[assignment]
    schedule: ScheduleName = "tuned"
    tolerance: float = Field(default=1e-3, gt=0, lt=1)
    batch_size: BatchSize | None = None
    exact: ClassVar[bool] = True

    @field_validator("batch_size", mode="before")
    @classmethod
    def _batch_is_a_size(cls, value: object) -> object:
        return None if value is None else batch_is_a_size(value)

    @model_validator(mode="after")
    def _schedule_takes_batches(self) -> Self:
        self.planned()  # raises what is wrong
        return self

    @property
    def vectors(self) -> int:
        """As of SOURCE, and what a solve holds."""
        return self.passes + 10

    @property
    def shares_passes(self) -> bool:
        """Every step of a solve is one."""
        return True

    def planned(self) -> Schedule:
        """The schedule with what the options replace."""
        found = NAMED[self.schedule]
        if self.batch_size is None:
            return found
        return replace(found, batch_size=None if self.batch_size == "full" else int(self.batch_size))

    @property
    def stochastic(self) -> bool:
        """By a schedule that takes mini-batches."""
        return self.planned().batch_size is not None

    def directions(self, work: Work, gradients: Sequence[Direction]) -> Made:
        """V_{q,l} = -(G_l + lambda_l I)^-1 S_{l+1} ... S_L g_q, one pass per segment, solved from the last segment backwards."""
        blocks, passes, solves = work.attributed.blocks, list[list[Direction]](), list[dict[str, Any]]()
        state = work.state or {"segment": torch.tensor(len(work.segments) - 1)}
        under_way = int(state["segment"])
        done = {name: tensor for name, tensor in state.items() if name.startswith("done/")}
        for k in reversed(range(len(work.segments))):
            if k > under_way:
                solution = _read(done, k)
            else:
                inner = {name.removeprefix("solve/"): t for name, t in state.items() if name.startswith("solve/") and k == under_way}
                solution = self._solve(work, k, gradients, inner or None, _keeper(work.on_step, k, done))
                done |= _written(solution, k)
            passes.insert(0, [Dense(-matrix) for matrix in unflatten(blocks, solution.x)])
            solves.insert(0, told(solution, self.tolerance))
            if k > 0:
                gradients = self._survive(work, k, gradients)
        segments = [self._told(segment) | {"lambda": self._lambda(work, k)} for k, segment in enumerate(work.segments)]
        return Made(passes, {"segments": segments, "solves": solves})

    def _lambda(self, work: Work, k: int) -> float:
        return 1 / work.segments[k].horizon + self._damping_in(work.segments[k])

    def _solve(self, work: Work, k: int, pushed: Sequence[Direction], state: State | None, on_step: OnStep | None) -> Solution:
        """(G + lambda I)^-1 u in segment k, for all queries together."""
        damping = self._lambda(work, k)
        system = system_of(work.averaged[k], work, pushed, "ggn", damping)
        precondition = ekfac_preconditioner(work.attributed.blocks, work.curvature[k], damping)
        options: dict[str, Any] = {"tolerance": self.tolerance, "seed": work.seed, "start": "ekfac"}
        try:
            return astra(system, precondition, schedule=self.planned(), state=state, on_step=on_step, **options)
        except InputError as error:
            said = str(error).partition(";")[0]
            if not said.startswith("astra diverged"):
                raise
            # The solver advises a step size or a damping; here both follow from lambda, which is large where a segment is short.
            segment = work.segments[k]
            where = f"astra_source, segment {k} (steps {segment.start_step}..{segment.stop_step}, lambda = {damping:.3g})"
            what = f'schedule = "{self.schedule}" takes steps in proportion to lambda, which does not do there'
            raise InputError(f'{where}: {said}; {what}: choose schedule = "tuned", or fewer, longer segments') from error


def _keeper(on_step: OnStep | None, k: int, done: State) -> OnStep | None:
    """What a solver calls with its state, so that the solves of earlier segments are kept beside it."""
    if on_step is None:
        return None
    before = dict(done)

    def keep(inner: State) -> None:
        on_step({"segment": torch.tensor(k), **before, **{f"solve/{name}": tensor for name, tensor in inner.items()}})

    return keep


def _written(solution: Solution, k: int) -> State:
    """A solution as tensors."""
    found: dict[str, Tensor] = {name: getattr(solution, name) for name in ("x", "residuals", "evaluations", "converged")}
    return {f"done/{k}/{name}": tensor for name, tensor in found.items()} | {f"done/{k}/steps": torch.tensor(solution.steps)}


def _read(state: State, k: int) -> Solution:
    found = {name: state[f"done/{k}/{name}"] for name in ("x", "residuals", "evaluations", "converged")}
    return Solution(**found, steps=int(state[f"done/{k}/steps"]))
