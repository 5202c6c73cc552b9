"""Stochastic Neumann iterations, also known as LiSSA (Agarwal et al. 2017; Koh & Liang 2017)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tda.solvers.descent import Descent, Stated, descend, safe_step
from tda.solvers.system import OnStep, Solution, State, System, Trace, lengths


def neumann(  # noqa: PLR0913  # each is an option of its own
    system: System,
    *,
    step_size: float | None = None,
    max_steps: int = 1000,
    tolerance: float = 1e-3,
    batch_size: int | None = None,
    repeats: int = 1,
    seed: int = 0,
    state: State | None = None,
    on_step: OnStep | None = None,
) -> Solution:
    """x_{j+1} = x_j + alpha (b - (C_B + damping) x_j) from x_0 = 0, B a fresh mini-batch of `batch_size`, or all examples (None).

    J full-batch steps are the filter (1 - (1 - alpha (s + damping))^J) / (s + damping) of the eigenvalues s: stopping acts as extra
    damping of about 1 / (alpha J). step_size: alpha; None: 1 / (1.05 (sigma_max + damping)), by Lanczos' iteration. repeats: runs on
    mini-batches of their own, averaged; full batches have no noise to average, and one run. tolerance, state and on_step as in
    `conjugate_gradients`; max_steps: of each run.
    Raises InputError where it diverges, naming the step and what would do.
    """
    full = batch_size is None or batch_size >= system.examples
    repeats = 1 if full else repeats
    stated: Stated = "found" if step_size is None else "step_size"
    spent = 0.0
    if state is not None:
        step_size = float(state["step_size"])
    elif step_size is None:
        step_size, spent = safe_step(system, None, batch_size, seed)
    alpha = step_size
    run = 0 if state is None else int(state["run"])
    before = None if state is None else state.get("before")
    own = None if state is None else {name: t for name, t in state.items() if name not in ("run", "before", "step_size")}
    del state
    while True:

        def keep(inner: State, run: int = run, before: Tensor | None = before) -> None:
            assert on_step is not None
            kept = {"run": torch.tensor(run), "step_size": torch.tensor(alpha, dtype=torch.float64)}
            on_step({**inner, **kept, **({} if before is None else {"before": before})})

        plan = Descent("sni", lambda _: alpha, 0.0, batch_size, max_steps, seed, run * max_steps, stated)
        told = None if on_step is None else keep
        found = descend(system, plan, None, None, spent=spent, tolerance=tolerance, state=own, on_step=told)
        if repeats == 1:
            return found
        before = found.x if before is None else before.add_(found.x)
        spent, own, run = float(found.evaluations[-1]), None, run + 1
        if run == repeats:
            return _averaged(system, replace(found, x=before / repeats), tolerance)
        del found


def _averaged(system: System, found: Solution, tolerance: float) -> Solution:
    """The solution with the residuals of the runs' mean."""
    trace = Trace(len(found.x), found.x, {"residuals": found.residuals, "evaluations": found.evaluations})
    trace.add(lengths(system.residual(found.x)) / system.scale, trace.spent + system.examples)
    return trace.solution(found.x, found.steps, tolerance)
