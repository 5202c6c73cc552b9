"""Step size, localisation, temperature, burn-in and draws of a chain, from the curvature at the checkpoint, each with its reason.

Near w* a chain is w <- w - (eps/2) A (w - w*) + sqrt(eps) xi with A = n_beta C + gamma I, C the curvature of the mean loss. Its stationary
covariance is (A - eps A^2 / 4)^-1: finite below eps A = 4, and relative to A^-1 too large by (eps A / 4) / (1 - eps A / 4), which is
worst in the stiffest direction. A direction forgets in 2 / (eps A) steps; the flattest, A = gamma, is the slowest.
With a preconditioner P (RMSprop) the drift and the variance of the noise are multiplied by it, and P A takes the place of A.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, inf, isfinite
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tda.curvature.inverse import HEURISTIC
from tda.errors import InputError
from tda.solvers.power import extreme_eigenvalues

#: Relative error of the posterior variance in the stiffest direction that the step size may cause.
BIAS = 0.05

#: The share of the stability bound that causes it.
PART = BIAS / (1 + BIAS)

#: Burn-in and length of the kept chain, in times that the slowest direction takes to forget: e^-4 = 2% of its variance are missing then,
#: and within-chain covariances (see `covariance`) are biased by 1%.
BURN_IN_MODE, DRAWS_IN_MODE = 2.0, 20.0

#: The noise of mini-batches, as a share of the noise that is wanted, up to which n_beta is raised by itself: a bound for the stiffest
#: direction, of which well-fitted examples cause a small part.
BATCH_NOISE = 1.0

#: Probes of the mean eigenvalue, and steps of a chain that nobody waits for.
PROBES, MOST_STEPS = 16, 20_000


@dataclass(frozen=True, eq=False)
class Curvature:
    """The curvature C of the mean loss at w*, by its products: vectors (k, D) -> (k, D), symmetric.

    size: D. preconditioner: the diagonal (D,) of P at w*, for rmsprop. mean_eigenvalue: tr(C) / D where known, as from EK-FAC; else 16
    products with random vectors find it. like: a tensor with the dtype and device of vectors; float64 where None.
    """

    product: Callable[[Tensor], Tensor]
    size: int
    preconditioner: Tensor | None = None
    mean_eigenvalue: float | None = None
    like: Tensor | None = None


@dataclass(frozen=True)
class Tuned:
    """Settings of a chain, in the library's convention (drift step_size / 2, noise variance step_size), and a sentence for each.

    localization: gamma. sigma_max: largest eigenvalue of the curvature C. damping: lambda = gamma / n_beta. bound: where step_size would
    be unstable. slowest: steps in which the flattest direction forgets.
    """

    step_size: float
    n_beta: float
    localization: float
    burn_in: int
    draws: int
    thinning: int
    sigma_max: float
    damping: float
    bound: float
    slowest: float
    reasons: tuple[str, ...]


def step_size_bound(n_beta: float, sigma_max: float, localization: float) -> float:
    """The step size at which SGLD diverges: 4 / (n_beta sigma_max + localization); inf where that sum is not above 0."""
    stiffest = n_beta * sigma_max + localization
    return 4 / stiffest if stiffest > 0 else inf


def steps_to_forget(step_size: float, localization: float) -> float:
    """Steps in which the flattest direction forgets where it was, 2 / (step_size localization); inf without localization."""
    return 2 / (step_size * localization) if step_size * localization > 0 else inf


def default_n_beta(examples: int, batch_size: int | None = None) -> float:
    """N, the posterior of the training itself; at most batch_size BATCH_NOISE / PART, 21 batches, where batches are not full.

    To leading order the covariance falls as 1 / n_beta, which the score's factor n_beta / N takes out again, and what is of second order
    in w - w* falls as 1 / n_beta relative to that: higher is nearer to the damped influence function. Beyond N the posterior is sharper
    than the data make it. The noise of mini-batches grows with n_beta: at step sizes of PART of the bound it adds n_beta PART /
    batch_size at most (see `_batch_noise`), and n_beta ends where that is BATCH_NOISE. docs/bif.md has what was measured.
    """
    return float(examples) if batch_size is None or batch_size >= examples else min(examples, batch_size * BATCH_NOISE / PART)


def tune(
    curvature: Curvature,
    *,
    examples: int,
    damping: float | Literal["heuristic"] = "heuristic",
    n_beta: float | None = None,
    draws: int = 500,
    batch_size: int | None = None,
    most_steps: int = MOST_STEPS,
    times: float = DRAWS_IN_MODE,
) -> Tuned:
    """Settings of chains around a checkpoint, from the curvature there. Deterministic.

    examples: N. damping: lambda, or "heuristic", 0.1 x the mean eigenvalue of C. batch_size: None means full batches. most_steps: of a
    chain, burn-in included; where the slowest direction needs more, the reasons say so. times: that draws are to see it forget.

    Raises:
        InputError: damping or n_beta is not above 0, examples or draws below 2, the curvature is not finite or not above 0 anywhere, P not
            positive.
    """
    _check(examples=examples, draws=draws, damping=damping, n_beta=n_beta, preconditioner=curvature.preconditioner)
    least, sigma_max, used = extreme_eigenvalues(curvature.product, curvature.size, like=curvature.like)
    if not isfinite(sigma_max) or sigma_max <= 0:
        raise InputError(
            f"the largest eigenvalue of the curvature is {sigma_max:.3g}; a step size needs one above 0: look at the checkpoint"
        )
    reasons = [f"sigma_max = {sigma_max:.4g}: the largest eigenvalue of the curvature at the checkpoint, from {used} products."]
    beta = _choose_n_beta(n_beta, examples, batch_size, reasons)
    damping_used = _choose_damping(damping, curvature, reasons)
    gamma = damping_used * beta
    reasons.append(
        f"localization = {gamma:.4g}: damping x n_beta, so that scores agree with influence functions of damping {damping_used:.3g}."
    )
    if beta * least + gamma <= 0:
        reasons.append(
            f"Warning: the least eigenvalue found is {least:.3g}, and n_beta x that + localization is not above 0: there the posterior has "
            f"no bump at the checkpoint, and chains leave it. Raise damping above {-least:.3g}."
        )
    stiffest, flattest = _ends(curvature, beta, gamma, sigma_max)
    bound = 4 / stiffest
    step_size = PART * bound
    of = "n_beta sigma_max + localization" if curvature.preconditioner is None else "largest eigenvalue of P (n_beta C + localization)"
    reasons.append(
        f"step_size = {step_size:.3g}: {PART:.1%} of the stability bound {bound:.3g} = 4 / ({of}); the variance of the stiffest direction "
        f"is then too large by {BIAS:.0%}, that of others by less."
    )
    if batch_size is not None and batch_size < examples:
        reasons.append(_batch_noise(step_size, beta, sigma_max, stiffest / (beta * sigma_max + gamma), batch_size))
    slowest = 2 / (step_size * flattest)
    burn_in, kept, thinning = _lengths(slowest, draws, most_steps, times, reasons)
    return Tuned(step_size, beta, gamma, burn_in, kept, thinning, sigma_max, damping_used, bound, slowest, tuple(reasons))


def _check(
    *, examples: int, draws: int, damping: float | Literal["heuristic"], n_beta: float | None, preconditioner: Tensor | None
) -> None:
    for name, count in (("examples", examples), ("draws", draws)):
        if count < 2:
            raise InputError(f"{name} must be at least 2, got {count}")
    for name, value in (("damping", damping), ("n_beta", n_beta)):
        if isinstance(value, (int, float)) and not (isfinite(value) and value > 0):
            raise InputError(f"{name} must be a finite number above 0, got {value:g}; leave it out to have it chosen")
    if preconditioner is not None and not bool((preconditioner > 0).all()):
        raise InputError("the preconditioner must be positive throughout; got an entry that is not")


def _choose_n_beta(given: float | None, examples: int, batch_size: int | None, reasons: list[str]) -> float:
    if given is not None:
        reasons.append(f"n_beta = {given:.4g}: as given.")
        return float(given)
    chosen = default_n_beta(examples, batch_size)
    noise = f"{1 / PART:.0f} batches of {batch_size}, whose noise may be {BATCH_NOISE:.0%} of what is wanted; N = {examples} is above it"
    why = f"N = {examples}, the posterior of the training itself" if chosen == examples else noise
    reasons.append(f"n_beta = {chosen:.4g}: {why}; terms of second order fall as 1 / n_beta beside those of first.")
    return chosen


def _choose_damping(given: float | Literal["heuristic"], curvature: Curvature, reasons: list[str]) -> float:
    if given != "heuristic":
        reasons.append(f"damping = {given:.4g}: as given.")
        return float(given)
    mean = hutchinson_mean(curvature) if curvature.mean_eigenvalue is None else curvature.mean_eigenvalue
    if not (isfinite(mean) and mean > 0):
        raise InputError(f'damping = "heuristic" needs a mean eigenvalue above 0, got {mean:.3g}; give damping a number')
    reasons.append(f"damping = {HEURISTIC * mean:.4g}: {HEURISTIC} x the mean eigenvalue {mean:.4g} of the curvature.")
    return HEURISTIC * mean


def hutchinson_mean(curvature: Curvature, probes: int = PROBES) -> float:
    """Mean eigenvalue tr(C) / D, by Hutchinson: the mean of s^T C s / D over fixed random sign vectors s."""
    signs = np.random.Generator(np.random.Philox(key=[1, 0])).integers(0, 2, (probes, curvature.size)) * 2.0 - 1.0
    vectors = torch.from_numpy(signs).to(torch.empty(0, dtype=torch.float64) if curvature.like is None else curvature.like)
    return float((vectors * curvature.product(vectors)).double().sum()) / (probes * curvature.size)


def _ends(curvature: Curvature, n_beta: float, gamma: float, sigma_max: float) -> tuple[float, float]:
    """Largest and least eigenvalue of P (n_beta C + gamma); the least as if some direction had no curvature."""
    if curvature.preconditioner is None:
        return n_beta * sigma_max + gamma, gamma
    scale = curvature.preconditioner.reshape(1, -1)
    _, stiffest, _ = extreme_eigenvalues(
        lambda v: n_beta * curvature.product(v) + gamma * v, curvature.size, precondition=lambda v: scale * v, like=curvature.like
    )
    return stiffest, gamma * float(scale.min())


def _batch_noise(step_size: float, n_beta: float, sigma_max: float, scale: float, batch_size: int) -> str:
    """How much a batch adds to the noise of the stiffest direction: (eps n_beta / 2)^2 P^2 sigma / batch at most, to eps P.

    At most, since the variance of an example's gradient is the curvature for a likelihood at its minimum, and less for a good
    fit. scale: P.
    """
    share = step_size * scale * n_beta**2 * sigma_max / (4 * batch_size)
    text = (
        f"Batches of {batch_size} add up to {share:.0%} to the noise of the stiffest direction (step_size n_beta^2 sigma_max / (4 batch))"
    )
    return (
        f"{text}; less where the examples are well fitted."
        if share <= BATCH_NOISE
        else f"{text}; a larger batch_size or lower n_beta takes it down."
    )


def _lengths(slowest: float, draws: int, most_steps: int, times: float, reasons: list[str]) -> tuple[int, int, int]:
    """(burn_in, draws, thinning)."""
    reasons.append(f"The slowest direction forgets in {slowest:.0f} steps (2 / (step_size localization), no curvature in it).")
    burn_in, kept = ceil(BURN_IN_MODE * slowest), max(ceil(times * slowest), draws)
    thinning = ceil(kept / draws)
    if burn_in + draws * thinning > most_steps:
        burn_in = min(burn_in, most_steps // 4)
        thinning = max(1, (most_steps - burn_in) // draws)
        reasons.append(
            f"Warning: it needs {ceil((BURN_IN_MODE + times) * slowest)} steps, more than {most_steps}: burn_in = {burn_in}, "
            f"draws = {draws} and thinning = {thinning} see it {draws * thinning / slowest:.1f} times. What scores owe to flat "
            "directions is too small; a higher damping mixes faster."
        )
        return burn_in, draws, thinning
    reasons.append(f"burn_in = {burn_in}: {BURN_IN_MODE:.0f} times that, when all but 2% of its variance is there.")
    reasons.append(f"draws = {draws}, thinning = {thinning}: {draws * thinning} steps see it {draws * thinning / slowest:.0f} times.")
    return burn_in, draws, thinning
