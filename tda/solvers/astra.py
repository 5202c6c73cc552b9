"""ASTRA: an iterative solve preconditioned by EK-FAC (2507.14740), with the paper's schedules and one of our own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from tda.solvers.descent import Descent, descend, safe_step
from tda.solvers.system import OnStep, Precondition, Solution, State, System


@dataclass(frozen=True)
class Schedule:
    """steps: at most. batch_size: examples of a step; None: all of them.

    step_size: alpha; of_damping: alpha as a multiple of the damping; neither: 1 / (1.05 sigma_max), sigma_max the largest eigenvalue of
    P^-1 (C_B + damping). momentum: of the heavy ball. decay: alpha is multiplied by it every `decay_every` steps.
    """

    steps: int
    batch_size: int | None = None
    step_size: float | None = None
    of_damping: float | None = None
    momentum: float = 0.0
    decay: float = 1.0
    decay_every: int = 1


#: The schedules that the paper published, and our default.
NAMED: dict[str, Schedule] = {
    "paper": Schedule(200, 256, of_damping=0.1, momentum=0.9, decay=0.5, decay_every=50),
    "paper-convnet": Schedule(200, 128, of_damping=0.01, momentum=0.9, decay=0.5, decay_every=50),
    "paper-gpt2": Schedule(300, 16, of_damping=1.0, momentum=0.9, decay=0.9, decay_every=100),
}


def astra(
    system: System,
    precondition: Precondition,
    *,
    schedule: Schedule,
    tolerance: float = 1e-3,
    seed: int = 0,
    start: Literal["ekfac", "zero"] = "ekfac",
    state: State | None = None,
    on_step: OnStep | None = None,
) -> Solution:
    """x_{k+1} = x_k - alpha_k P^-1 [(C_B + damping) x_k - b], with momentum, from x_0 = P^-1 b or from zero."""
    spent = 0.0
    alpha = schedule.step_size
    if schedule.of_damping is not None:
        alpha = schedule.of_damping * float(system.damping.double().mean())
    if state is not None:
        alpha = float(state["step_size"])
    elif alpha is None:
        alpha, spent = safe_step(system, precondition, schedule.batch_size, seed)
    first = alpha

    def keep(inner: State) -> None:
        assert on_step is not None
        on_step({**inner, "step_size": torch.tensor(first, dtype=torch.float64)})

    def step_size(k: int) -> float:
        return first * schedule.decay ** (k // schedule.decay_every)

    plan = Descent("astra", step_size, schedule.momentum, schedule.batch_size, schedule.steps, seed)
    begin = precondition(system.right) if start == "ekfac" else torch.zeros_like(system.right)
    return descend(
        system, plan, precondition, begin, spent=spent, tolerance=tolerance, state=state, on_step=None if on_step is None else keep
    )
