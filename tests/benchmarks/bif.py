"""Bayesian influence on the digits' MLP: against the exact damped influence, and against models retrained on random subsets.

    python -m tests.benchmarks.bif                    # both, some minutes
    python -m tests.benchmarks.bif --part trend       # rank correlation with the exact influence, and error bars, by number of draws
    python -m tests.benchmarks.bif --part lds         # LDS at several alpha beside GradDot, EK-FAC and the dense GGN

The protocol is that of tests.benchmarks.lds (MLP 64-32-32-10, 30 epochs, 100 queries, their margin). Chains run with localization =
damping x n_beta, four of them, and a step size of 5% of the stability bound (`tda.sampling.settle`). In the LDS, each method's damping is
chosen by 30 of the queries, for every alpha anew, and the others are reported; intervals are 95%, over the subsets.
"""

import argparse
import json
import time

import numpy as np
import torch
from scipy.stats import spearmanr

from tda.evaluation.lds import bootstrap, ceiling, interval, lds
from tda.evaluation.retraining import retrain
from tda.evaluation.subsets import tuning
from tda.methods.bif import Bif
from tda.modules import inspect
from tda.problems.digits import Digits
from tda.sampling.chains import landscape, start
from tda.sampling.covariance import covariance
from tda.sampling.diagnostics import r_hat
from tda.sampling.recording import Recorder
from tda.sampling.settle import settle
from tests.benchmarks.lds import ground_truth, influence

ALPHAS = (0.1, 0.5, 0.9, 0.98)
DAMPINGS = (1.0, 0.1, 0.03, 0.01, 3e-3, 1e-3)
SAMPLED = (1.0, 0.1, 0.01)
LADDER = [{"name": "graddot"}, *({"name": name, "damping": d} for name in ("ekfac", "ggn") for d in DAMPINGS)]


def trajectories(problem, seed, damping, n_beta, draws, thinning):
    """Sampling, losses (chain, draw, train) and measurements (chain, draw, query) around the model of a seed, and seconds."""
    started = time.perf_counter()
    train = problem.train_data()
    attributed = inspect(problem, retrain(problem, train, range(len(train)), seed), train)
    method = Bif(damping=damping, n_beta=n_beta, draws=draws, thinning=thinning, burn_in=min(2000, draws * thinning))
    sampling = settle(attributed, train, {**json.loads(method.fits[0].of), "seed": seed}, batch_size=256).sampling
    shared = landscape(attributed, sampling, train)
    recorder, state, parts = Recorder(attributed, shared, train, problem.query_data()), start(shared, range(sampling.chains)), []
    for piece in sampling.pieces:
        state, recorded = recorder.record(state, piece)
        parts.append((recorded.loss_train, recorded.measurement_query))
    assert not state.lost, state.lost
    losses, measured = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    return sampling, losses, measured, time.perf_counter() - started


def bif(sampling, losses, measured, normalized=False):
    """Scores and standard errors (query, train) in the common unit."""
    value, error = covariance(losses, measured, normalized=normalized)
    scale = 1.0 if normalized else sampling.n_beta / losses.shape[2]
    return -scale * value.numpy(), scale * error.numpy()


def trend(problem, given):
    """Rank correlation with the exact damped influences as draws grow."""
    print("| damping | n_beta | draws | Spearman to GGN: all pairs / per query | to the Hessian | stderr / score | R-hat, train loss |")
    print("|---|---|---|---|---|---|---|")
    dampings = given.dampings
    exact = influence(problem, 0, [{"name": name, "damping": d} for d in dampings for name in ("ggn", "hessian")])
    for place, damping in enumerate(dampings):
        ggn, hessian = exact[2 * place : 2 * place + 2]
        for n_beta in given.betas:
            sampling, losses, measured, seconds = trajectories(problem, 0, damping, n_beta, given.draws[-1], given.thinning)
            for draws in given.draws:
                score, error = bif(sampling, losses[:, :draws], measured[:, :draws])
                rows = [f"{rank(score, e):.3f} / {per_query(score, e):.3f}" for e in (ggn, hessian)]
                mixed = float(r_hat(losses[:, :draws].mean(2).numpy())[0])
                share = error.mean() / np.abs(score).mean()
                print(f"| {damping} | {n_beta:g} | 4 x {draws} | {rows[0]} | {rows[1]} | {share:.2f} | {mixed:.3f} |", flush=True)
            print(
                f"step_size {sampling.step_size:.3g}, thinning {sampling.thinning}, burn_in {sampling.burn_in}; {seconds:.0f} s", flush=True
            )


def rank(x, y):
    """Spearman over all pairs."""
    return spearmanr(x.ravel(), y.ravel()).statistic


def per_query(x, y):
    """Mean Spearman over queries."""
    return np.mean([spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)])


def ladder(problem, given):
    """LDS at several alpha."""
    names = [(table["name"], table.get("damping")) for table in LADDER]
    chains = [(d, b) for d in SAMPLED for b in given.lds_betas]
    names += [(f"{kind}, n_beta {b:g}", d) for d, b in chains for kind in ("bif", "bif normalized")]
    scores = []
    for seed in range(given.models):
        rows = list(influence(problem, seed, LADDER))
        for damping, n_beta in chains:
            found = trajectories(problem, seed, damping, n_beta, given.lds_draws, given.thinning)[:3]
            rows += [bif(*found, normalized=normalized)[0] for normalized in (False, True)]
        scores.append(np.stack(rows))
        print(f"attributed at {seed + 1} models", flush=True)
    scores = np.stack(scores)
    chosen_by = tuning(given.queries, 0.3, 0)
    print("| alpha | ceiling | method | damping | LDS, single model | mean of models | 95% |\n|---|---|---|---|---|---|---|")
    for alpha in ALPHAS:
        chosen, measured, _ = ground_truth(problem, given.subsets, given.seeds, alpha)
        top = ceiling(measured)[~chosen_by].mean()
        single, mean = lds(scores, chosen, measured).mean(0), scores.mean(0)
        each = lds(mean, chosen, measured)
        for method in dict.fromkeys(name for name, _ in names):
            own = [m for m, (name, _) in enumerate(names) if name == method]
            best = max(own, key=lambda m: each[m, chosen_by].mean())
            reported = measured[:, :, ~chosen_by]
            value = each[best, ~chosen_by].mean()
            bounds = interval(bootstrap(mean[[best]][:, ~chosen_by], chosen, reported, draws=300)[0], value)
            damping = names[best][1] or ""
            print(
                f"| {alpha} | {top:.3f} | {method} | {damping} | {single[best, ~chosen_by].mean():.3f} | {value:.3f} "
                f"| {bounds.low:.3f} .. {bounds.high:.3f} |",
                flush=True,
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("subsets", 60),
        ("seeds", 16),
        ("models", 2),
        ("queries", 100),
        ("threads", 1),
        ("thinning", 10),
        ("lds-draws", 2000),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--draws", type=int, nargs="+", default=[125, 500, 2000, 8000])
    parser.add_argument("--betas", type=float, nargs="+", default=[200.0, 10_000.0, 100_000.0], help="n_beta of the trend")
    parser.add_argument("--dampings", type=float, nargs="+", default=[0.1], help="of the trend")
    parser.add_argument("--lds-betas", type=float, nargs="+", default=[200.0, 10_000.0], help="n_beta of the LDS")
    parser.add_argument("--part", choices=["trend", "lds"])
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    problem = Digits(queries=given.queries, measurement="margin")
    for name, part in (("trend", trend), ("lds", ladder)):
        if given.part in (None, name):
            part(problem, given)


if __name__ == "__main__":
    main()
