"""ASTRA: an iterative solve preconditioned by EK-FAC (2507.14740), with the paper's schedules and one of our own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from tda.errors import InputError
from tda.solvers.block import block_conjugate_gradients
from tda.solvers.descent import Descent, Stated, descend, safe_step
from tda.solvers.preconditioner import EKFACPreconditioner
from tda.solvers.system import OnStep, Precondition, Solution, State, System


@dataclass(frozen=True)
class Schedule:
    """steps: at most. batch_size: examples of a step; None: all of them.

    step_size: alpha; of_damping: alpha as a multiple of the damping; neither: 1 / (1.05 sigma_max), sigma_max the largest eigenvalue of
    P^-1 (C_B + damping). momentum: of the heavy ball. decay: alpha is multiplied by it every `decay_every` steps.
    conjugate: instead of all that, the best steps in the space that the queries span together, over all examples (`block`), where the
    preconditioner's damping is at least the share `share` of EK-FAC's largest eigenvalue.
    """

    steps: int
    batch_size: int | None = None
    step_size: float | None = None
    of_damping: float | None = None
    momentum: float = 0.0
    decay: float = 1.0
    decay_every: int = 1
    conjugate: bool = False
    share: float = 0.0

    def __post_init__(self) -> None:
        given = [name for name in ("batch_size", "step_size", "of_damping") if getattr(self, name) is not None]
        given += ["momentum"] if self.momentum else []
        if self.conjugate and given:
            value = getattr(self, given[0])
            raise InputError(
                f'{given[0]} = {value}: schedule "tuned" takes all examples and finds its own steps; leave it out, or choose "paper"'
            )


#: The schedules that the paper published, and our default, chosen by measurement: see docs/solvers.md.
NAMED: dict[str, Schedule] = {
    "tuned": Schedule(200, conjugate=True, share=0.3),
    "paper": Schedule(200, 256, of_damping=0.1, momentum=0.9, decay=0.5, decay_every=50),
    "paper-convnet": Schedule(200, 128, of_damping=0.01, momentum=0.9, decay=0.5, decay_every=50),
    "paper-gpt2": Schedule(300, 16, of_damping=1.0, momentum=0.9, decay=0.9, decay_every=100),
}


def astra(
    system: System,
    precondition: Precondition,
    *,
    schedule: Schedule = NAMED["tuned"],
    tolerance: float = 1e-3,
    seed: int = 0,
    start: Literal["ekfac", "zero"] = "ekfac",
    state: State | None = None,
    on_step: OnStep | None = None,
) -> Solution:
    """x_{k+1} = x_k - alpha_k P^-1 [(C_B + damping) x_k - b], with momentum, from x_0 = P^-1 b ("ekfac") or from "zero".

    precondition: P^-1, EK-FAC with its damping. All queries share each mini-batch and its linearisation. From zero, one full-batch step
    of size 1 is EK-FAC. A solve ends for all queries, or with full batches for each, where the residual over all examples is within
    `tolerance` of ||b||. state: of an earlier call with the same arguments, which is gone on with bit for bit; on_step is given it after
    every step. Raises InputError where it diverges, naming the step and what would do, and where its steps would be of size 0.
    """
    if schedule.conjugate:
        options: dict[str, Any] = {"tolerance": tolerance, "max_steps": schedule.steps, "state": state, "on_step": on_step}
        begin = precondition(system.right) if start == "ekfac" and state is None else None
        return block_conjugate_gradients(system, _wide(precondition, schedule.share), start=begin, **options)
    alpha, spent = _first_step(system, precondition, schedule, seed) if state is None else (float(state["step_size"]), 0.0)

    def step_size(k: int) -> float:
        return alpha * schedule.decay ** (k // schedule.decay_every)

    def keep(inner: State) -> None:
        assert on_step is not None
        on_step({**inner, "step_size": torch.tensor(alpha, dtype=torch.float64)})

    stated: Stated = "step_size" if schedule.step_size is not None else "schedule" if schedule.of_damping is not None else "found"
    plan = Descent("astra", step_size, schedule.momentum, schedule.batch_size, schedule.steps, seed, stated=stated)
    begin = precondition(system.right) if start == "ekfac" and state is None else None
    told = None if on_step is None else keep
    return descend(system, plan, precondition, begin, spent=spent, tolerance=tolerance, state=state, on_step=told)


def _wide(precondition: Precondition, share: float) -> Precondition:
    """EK-FAC is right about the largest eigenvalues and wrong about the rest, where it is better to trust it with nothing."""
    return precondition.damped(share * precondition.largest) if isinstance(precondition, EKFACPreconditioner) else precondition


def _first_step(system: System, precondition: Precondition, schedule: Schedule, seed: int) -> tuple[float, float]:
    """(alpha of the first step, evaluations that it cost per query)."""
    if schedule.step_size is not None:
        return schedule.step_size, 0.0
    if schedule.of_damping is not None:
        alpha = schedule.of_damping * float(system.damping.double().mean())
        if alpha == 0:
            raise InputError(
                f"damping = 0: the schedule's steps are {schedule.of_damping:g} x damping, and would lead nowhere; "
                'give a damping, or choose schedule = "tuned"'
            )
        return alpha, 0.0
    return safe_step(system, precondition, schedule.batch_size, seed)
