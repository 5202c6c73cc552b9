"""Whether chains can be trusted: R-hat, effective sample size, local learning coefficient, distance; and a verdict in words.

R-hat and the effective sample size are those of Vehtari, Gelman, Simpson, Carpenter & Buerkner (2021): chains split in halves, draws
replaced by normal scores of their ranks over all chains, and the larger of R-hat of these and of the folded |x - median|.

    R-hat = sqrt( ((n - 1)/n W + B/n) / W )          W: variance within half chains of n draws, B/n: variance of their means
    ESS   = S / tau,   tau = -1 + 2 sum_k P_k         P_k = rho_2k + rho_2k+1, while positive, made non-increasing (Geyer)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, inf, isfinite, log10, nan, sqrt

import numpy as np

from tda.errors import InputError
from tda.sampling.covariance import BATCHES
from tda.sampling.options import Sampling
from tda.sampling.tuning import BURN_IN_MODE, DRAWS_IN_MODE, PART, steps_to_forget

#: Numbers worked on at a time.
BLOCK = 1 << 22

#: R-hat above which chains disagree: a tenth of the variance lies between their halves then. 4 chains in stationarity that are worth 200
#: draws have 1.02 of themselves, and 1.05 in one series of 100; 1.01 (Vehtari et al.) is for means, and asks for more than 1,000 draws. Of
#: many series of one kind, so large a share may be above it.
R_HAT, DISAGREEING = 1.05, 0.05

#: The effective sample size below which a mean is noise: 100 in all gives a covariance to 14% of the product of its spreads.
ESS = 100.0

#: Share of scores that may lie within two standard errors of zero: were all of them noise, a twentieth to a tenth would not. Drift of the
#: distance (relative, and in standard errors), and how far beyond the prior's distance chains may be, before it is said.
UNCERTAIN, DRIFT, DRIFT_ERRORS, BEYOND = 0.9, 0.02, 3.0, 1.1


@dataclass(frozen=True)
class Diagnostics:
    """What is known about a run of chains. Numbers that cannot be had are NaN.

    sampling: as it was run. chains, draws: that are left, without the lost. lost: why chains stopped, a line each.
    r_hat, ess: by name of the series, the worst of each; disagreeing: the share of them whose R-hat is above R_HAT.
    llc, llc_stderr: n_beta (E[L(w)] - L(w*)).
    distance: mean ||w - w*||; prior_distance: sqrt(D / localization), what the prior alone would give. drift, drift_stderr: mean distance
    of the second half of the draws minus that of the first. slowest: steps in which the flattest direction forgets. bound: the step size
    at which the stiffest diverges. uncertain: share of scores with |score| < 2 stderr. still: series that never moved.
    """

    sampling: Sampling
    chains: int
    draws: int
    r_hat: Mapping[str, float]
    ess: Mapping[str, float]
    prior_distance: float
    slowest: float
    llc: float = nan
    llc_stderr: float = nan
    distance: float = nan
    drift: float = nan
    drift_stderr: float = nan
    bound: float = nan
    uncertain: float = nan
    still: int = 0
    lost: tuple[str, ...] = ()
    disagreeing: Mapping[str, float] = field(default_factory=dict)


def diagnose(
    series: Mapping[str, np.ndarray],
    sampling: Sampling,
    *,
    parameters: int,
    bound: float = nan,
    uncertain: float = nan,
    still: int = 0,
    lost: Sequence[str] = (),
) -> Diagnostics:
    """All diagnostics of the chains that were not lost.

    series: name -> (chain, draw) or (chain, draw, k). "train loss" (the mean over training examples of l(w) - l(w*)) gives the LLC,
    "distance" (||w - w*||) the distance and its drift; of every other only R-hat and the effective sample size are taken, the worst over
    k. parameters: D, how many move. bound: `tuning.step_size_bound`, or Tuned.bound, where known. One chain has no R-hat: NaN, and
    `verdict` says so. With rmsprop the slowest direction is taken to have the largest P there is, 10: it is no faster than said.

    Raises:
        InputError: no series, a value is not finite (the series is named), or fewer than 4 draws.
    """
    if not series:
        raise InputError('diagnostics need a series of draws, got none; give "train loss" and "distance"')
    found = {name: np.asarray(x, dtype=np.float64) for name, x in series.items()}
    for name, x in found.items():
        if not np.isfinite(x).all():
            raise InputError(f"series {name!r} has values that are not finite; leave lost chains out")
    chains, draws = next(iter(found.values())).shape[:2]
    gamma, scale = sampling.localization, 10.0 if sampling.sampler == "rmsprop" else 1.0
    each = {name: r_hat(x) if chains > 1 else np.full(1, nan) for name, x in found.items()}
    known = Diagnostics(
        sampling,
        chains,
        draws,
        r_hat={name: float(values.max()) for name, values in each.items()},
        ess={name: float(ess(x).min()) for name, x in found.items()},
        prior_distance=sqrt(parameters / gamma) if gamma > 0 else inf,
        slowest=steps_to_forget(sampling.step_size * scale, gamma),
        bound=bound,
        uncertain=uncertain,
        still=still,
        lost=tuple(lost),
        disagreeing={name: float((values > R_HAT).mean()) for name, values in each.items()},
    )
    if "train loss" in found:
        llc, error = learning_coefficient(found["train loss"], sampling.n_beta)
        known = replace(known, llc=llc, llc_stderr=error)
    if "distance" in found:
        drift, error = drift_of(found["distance"])
        known = replace(known, distance=float(found["distance"].mean()), drift=drift, drift_stderr=error)
    return known


def r_hat(x: np.ndarray) -> np.ndarray:
    """Rank-normalised split R-hat, the larger of bulk and folded, per series: (chain, draw[, k]) -> (k,), float64.

    1 where a series is the same number throughout.

    Raises:
        InputError: fewer than 2 chains, or fewer than 4 draws.
    """
    if len(x) < 2:
        raise InputError(f"R-hat compares chains and needs at least 2, got {len(x)}; raise chains")
    return _in_blocks(x, lambda some: np.maximum(_plain_r_hat(_scores(some)), _plain_r_hat(_scores(_folded(some)))))


def ess(x: np.ndarray) -> np.ndarray:
    """Bulk effective sample size per series: (chain, draw[, k]) -> (k,), float64, at most S log10(S) for S draws in all.

    S where a series is the same number throughout.

    Raises:
        InputError: fewer than 4 draws.
    """
    return _in_blocks(x, lambda some: _effective(_scores(some)))


def _in_blocks(x: np.ndarray, of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """of (chain, draw, some) -> (some,), for blocks of series at a time; halves are made first."""
    x = np.asarray(x)
    if x.shape[1] < 4:
        raise InputError(f"R-hat and the effective sample size need at least 4 draws per chain, got {x.shape[1]}; raise draws")
    x = x.reshape(*x.shape[:2], -1)
    step = max(1, BLOCK // (x.shape[0] * x.shape[1]))
    parts = [of(_halves(x[:, :, start : start + step].astype(np.float64))) for start in range(0, x.shape[2], step)]
    return np.concatenate(parts) if parts else np.zeros(0)


def _halves(x: np.ndarray) -> np.ndarray:
    """(chain, draw, k) -> (2 chain, draw // 2, k); the middle draw of an odd number is left out."""
    half = x.shape[1] // 2
    return np.concatenate([x[:, :half], x[:, -half:]])


def _folded(x: np.ndarray) -> np.ndarray:
    folded: np.ndarray = np.abs(x - np.median(x, axis=(0, 1)))
    return folded


def _scores(x: np.ndarray) -> np.ndarray:
    """Normal scores of the ranks over all chains, ties sharing their mean rank."""
    from scipy.special import ndtri
    from scipy.stats import rankdata  # half a second, which no process pays that samples nothing

    count = x.shape[0] * x.shape[1]
    ranks = rankdata(x.reshape(count, -1), axis=0)
    scores: np.ndarray = ndtri((ranks - 0.375) / (count + 0.25)).reshape(x.shape)
    return scores


def _plain_r_hat(z: np.ndarray) -> np.ndarray:
    draws = z.shape[1]
    within, between = z.var(1, ddof=1).mean(0), z.mean(1).var(0, ddof=1)
    ratio = np.divide(between, within, out=np.where(between > 0, inf, 1 / draws), where=within > 0)
    found: np.ndarray = np.sqrt((draws - 1) / draws + ratio)
    return found


def _effective(z: np.ndarray) -> np.ndarray:
    """Effective sample size of normal scores (half chain, draw, k)."""
    chains, draws, _ = z.shape
    total = chains * draws
    own = _autocovariance(z)
    within = own[:, 0].mean(0) * draws / (draws - 1)
    variance = within * (draws - 1) / draws + z.mean(1).var(0, ddof=1)
    moves = variance > 0
    rho = 1 - (within - own.mean(0)) / np.where(moves, variance, 1.0)
    rho[0] = 1.0
    pairs = rho[: draws // 2 * 2].reshape(draws // 2, 2, -1).sum(1)
    positive = np.logical_and.accumulate(pairs > 0, axis=0)
    tau = -1 + 2 * np.where(positive, np.minimum.accumulate(pairs, axis=0), 0.0).sum(0)
    return np.where(moves, total / np.maximum(tau, 1 / log10(total)), float(total))


def _autocovariance(z: np.ndarray) -> np.ndarray:
    """Of each chain by itself, at every lag, divided by the number of draws: (chain, draw, k) -> (chain, lag, k)."""
    from scipy.fft import irfft, next_fast_len, rfft

    draws = z.shape[1]
    size = next_fast_len(2 * draws)
    spectrum = rfft(z - z.mean(1, keepdims=True), size, axis=1)
    found: np.ndarray = irfft(np.abs(spectrum) ** 2, size, axis=1)[:, :draws] / draws
    return found


def mean_and_stderr(x: np.ndarray) -> tuple[float, float]:
    """Mean of (chain, draw), and its standard error: between chains or of batch means, whichever is larger, as scores have it."""
    chains, draws = x.shape
    means = np.stack([part.mean(1) for part in np.array_split(x, min(BATCHES, draws), axis=1)], 1)
    count = means.shape[1]
    within = sqrt(float(means.var(1, ddof=1).sum()) / count) / chains if count > 1 else nan
    between = float(x.mean(1).std(ddof=1)) / sqrt(chains) if chains > 1 else 0.0
    return float(x.mean()), max(within, between)


def learning_coefficient(train_loss: np.ndarray, n_beta: float) -> tuple[float, float]:
    """(LLC, stderr): n_beta (E[L(w)] - L(w*)) of train_loss (chain, draw), the mean over examples of l(w) - l(w*)."""
    mean, error = mean_and_stderr(np.asarray(train_loss, dtype=np.float64))
    return n_beta * mean, n_beta * error


def drift_of(distance: np.ndarray) -> tuple[float, float]:
    """(drift, stderr): the mean distance (chain, draw) of the second half of the draws minus that of the first."""
    half = distance.shape[1] // 2
    (first, a), (second, b) = mean_and_stderr(distance[:, :half]), mean_and_stderr(distance[:, -half:])
    return second - first, sqrt(a * a + b * b)


def verdict(found: Diagnostics) -> list[str]:
    """Sentences in plain words: each says what is not trustworthy, with the number, and what to change. None: nothing was found."""
    checks = (_about_chains, _about_agreement, _about_mixing, _about_step, _about_distance, _about_scores)
    return [sentence for check in checks for sentence in check(found)]


def _about_chains(found: Diagnostics) -> list[str]:
    said = [f"A chain was lost and plays no part: {line}" for line in found.lost]
    if found.chains < 2:
        said.append("One chain alone cannot show whether chains agree, and its standard errors are too small: run at least 4 chains.")
    return said


def _about_agreement(found: Diagnostics) -> list[str]:
    said = []
    burn_in, draws = _longer(found)
    for name, value in found.r_hat.items():
        share = found.disagreeing.get(name, 1.0)
        if value > R_HAT and share > DISAGREEING:
            said.append(
                f"The chains disagree on {_share_of(share)}{name}: R-hat is {'' if share == 1 else 'up to '}{value:.3f}, above {R_HAT}. "
                f"Raise burn_in to {burn_in} and draws to {draws}, or raise localization."
            )
    for name, value in found.ess.items():
        if value < ESS:
            more = ceil(found.draws * ESS / max(value, 1.0) / 50) * 50
            thinning = found.sampling.thinning * ceil(more / found.draws)
            said.append(
                f"The draws of {name} are worth {value:.0f} independent ones, fewer than {ESS:.0f}. "
                f"Raise draws to about {more}, or thinning to {thinning} to store no more than now."
            )
    return said


def _share_of(share: float) -> str:
    """Of many series, how many; nothing where it is all."""
    return "" if share == 1 else f"{share:.0%} of the "


def _longer(found: Diagnostics) -> tuple[int, int]:
    """Burn-in and draws to ask for: what the slowest direction needs, and at least twice what there was."""
    slow = found.slowest if isfinite(found.slowest) else 0.0
    draws = ceil(DRAWS_IN_MODE * slow / found.sampling.thinning)
    burn_in = max(2 * found.sampling.burn_in, ceil(BURN_IN_MODE * slow), found.draws * found.sampling.thinning // 10)
    return burn_in, max(2 * found.draws, draws)


def _about_mixing(found: Diagnostics) -> list[str]:
    said, slow, run = [], found.slowest, found.sampling
    if slow == inf:
        return ["localization is 0, so nothing holds the flat directions and they never mix: set localization = damping x n_beta."]
    if run.burn_in < BURN_IN_MODE * slow:
        said.append(
            f"The slowest direction forgets in {slow:.0f} steps (2 / (step_size localization)) and burn_in is {run.burn_in}, less than "
            f"twice that: flat directions are still spreading from w*. Raise burn_in to {ceil(BURN_IN_MODE * slow)}, or localization."
        )
    kept = found.draws * run.thinning
    if kept < DRAWS_IN_MODE * slow:
        said.append(
            f"The kept part of a chain, draws x thinning = {kept} steps, is {kept / slow:.1f} times what the slowest direction takes to "
            f"forget ({slow:.0f}), less than {DRAWS_IN_MODE:.0f}: what scores owe to flat directions is too small. "
            f"Raise thinning to {ceil(DRAWS_IN_MODE * slow / found.draws)}, or localization."
        )
    return said


def _about_step(found: Diagnostics) -> list[str]:
    step, bound = found.sampling.step_size, found.bound
    share, way = step / bound, f"Lower step_size to {PART * bound:.2g}."
    limit = f"the stability bound {bound:.3g} = 4 / (n_beta sigma_max + localization)"
    if share >= 1:
        return [f"step_size {step:.3g} is not below {limit}: the stiffest direction diverges. {way}"]
    if share > 2 * PART:
        excess = share / (1 - share)
        return [f"step_size {step:.3g} is {share:.0%} of {limit}: the variance of the stiffest direction is {excess:.0%} too large. {way}"]
    return []


def _about_distance(found: Diagnostics) -> list[str]:
    said = []
    if found.distance > BEYOND * found.prior_distance:
        said.append(
            f"The chains are {found.distance:.3g} from the checkpoint, further than the prior alone would let them, "
            f"{found.prior_distance:.3g} = sqrt(D / localization): w* is no minimum, or steps are too long. "
            "Raise localization, or lower step_size."
        )
    if abs(found.drift) > max(DRIFT * found.distance, DRIFT_ERRORS * found.drift_stderr):
        way = "moving away from" if found.drift > 0 else "coming back to"
        said.append(
            f"The chains are still {way} the checkpoint: the mean distance, {found.distance:.3g}, changes by {found.drift:+.2g} from the "
            f"first half of the draws to the second. Raise burn_in to {_longer(found)[0]}, or localization."
        )
    return said


def _about_scores(found: Diagnostics) -> list[str]:
    said = []
    if found.uncertain > UNCERTAIN:
        said.append(
            f"{found.uncertain:.0%} of the scores lie within two standard errors of zero, hardly fewer than if all were noise: read the "
            "largest alone, beside their standard errors. Four times the draws, or chains, halve the errors."
        )
    if found.still:
        said.append(f"{found.still} losses or measurements never moved; their correlations are put at 0.")
    return said
