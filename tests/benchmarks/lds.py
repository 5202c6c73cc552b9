"""LDS of a ladder of methods on the digits' MLP, against the ground truth of models retrained on random halves of the training set.

    python -m tests.benchmarks.lds                                  # 60 subsets, 16 seeds, 8 models, margin: some minutes
    python -m tests.benchmarks.lds --measurement loss --models 2
    python -m tests.benchmarks.lds --timing                         # only: models trained at once against one by one
    python -m tests.benchmarks.lds --timing --network cnn

The protocol: digits standardised with standard deviations floored at .8, 1,437 training images, 100 queries, MLP 64-32-32-10, SGD
momentum .9, learning rate .05, weight decay 1e-3, batches of 64, 30 epochs. Everything runs in this process and in memory.
"""

import argparse
import json
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from tda import flat
from tda.curvature.spectrum import Spectrum, decompose
from tda.directions import query_gradients, squared_norms
from tda.evaluation.ceiling import mean_ceiling
from tda.evaluation.lds import bootstrap, interval, lds
from tda.evaluation.retraining import STACK, measure_stack, retrain, retrained
from tda.evaluation.subsets import masks, training_seed
from tda.methods import parse
from tda.methods.work import Work
from tda.modules import inspect
from tda.problems.digits import Digits, DigitsCNN
from tda.scoring import Scorer, score
from tda.solvers.operator import Operator
from tests.tda.pipeline import fit

ALPHA = 0.5
DAMPINGS = (1.0, 0.1, 0.03, 0.01, 5e-3, 2e-3, 1e-3, 1e-4, 1e-5)
LADDER = [
    {"name": "graddot"},
    *({"name": name, "damping": d} for name in ("kfac", "ekfac", "block_ggn", "ggn", "hessian") for d in DAMPINGS),
]
#: Query blocks and rows of the matrix computed at a time.
ROWS = 256


def ground_truth(problem, subsets, seeds):
    """masks (subset, train), measurement (subset, seed, query), and seconds."""
    train = problem.train_data()
    chosen = masks(len(train), ALPHA, subsets, 0)
    ids = [np.flatnonzero(mask).tolist() for mask in chosen for _ in range(seeds)]
    numbers = [training_seed(0, ALPHA, s, r) for s in range(subsets) for r in range(seeds)]
    started = time.perf_counter()
    found = retrained(problem, train, problem.query_data(), ids, numbers)
    return chosen, found.view(subsets, seeds, -1).numpy(), time.perf_counter() - started


def spectra(attributed, train, kind):
    """The dense curvature's eigendecomposition, one per diagonal block."""
    operator = Operator(attributed, train, kind, 512)
    size = flat.total(attributed.blocks)
    matrix = torch.cat([operator.rows(start, min(start + ROWS, size)) for start in range(0, size, ROWS)])
    if kind != "block_ggn":
        return (Spectrum(tuple(range(len(attributed.blocks))), *decompose(matrix)),)
    edges = np.cumsum([0, *(block.size for block in attributed.blocks)])
    return tuple(Spectrum((b,), *decompose(matrix[i:j, i:j])) for b, (i, j) in enumerate(pairwise(edges)))


def influence(problem, seed, ladder):
    """Scores (method, query, train) of one model trained on everything, in float64."""
    train, queries = problem.train_data(), problem.query_data()
    attributed = inspect(problem, retrain(problem, train, range(len(train)), seed).double(), train)
    methods = [parse({**table, "fisher": "exact"} if table["name"] in ("kfac", "ekfac") else table) for table in ladder]
    gradients, _ = query_gradients(attributed, queries, range(len(queries)), batch_size=128)
    norms = torch.stack([squared_norms(g) for g in gradients]).sum(0).sqrt()
    fits, scorers = {}, []
    for method in methods:
        for need in method.fits:
            if need not in fits:
                kronecker = need.kind == "kronecker"
                whole = [range(len(train))]
                fits[need] = (
                    fit(attributed, train, whole, fisher="exact", batch_size=256) if kronecker else spectra(attributed, train, need.of)
                )
        work = Work(attributed, train, [fits[need] for need in method.fits], 0, 256)
        scorers.append(Scorer(method.title, method.directions(work, gradients).passes[0], norms))
    return score(attributed, scorers, train, range(len(train)), examples=len(train), batch_size=256, self_influence=False).influence.numpy()


def timing(problem, models, alone):
    """Milliseconds per model, trained at once and one by one, on the same subsets with the same seeds."""
    train, chosen = problem.train_data(), masks(len(problem.train_data()), ALPHA, max(3, models), 0)
    ids, seeds = [np.flatnonzero(mask).tolist() for mask in chosen][:models], list(range(models))
    measure_stack(problem, train, problem.query_data(), ids[:2], seeds[:2])
    started = time.perf_counter()
    together = retrained(problem, train, problem.query_data(), ids, seeds)
    middle = time.perf_counter()
    single = retrained(problem, train, problem.query_data(), ids[:alone], seeds[:alone], stacked=False)
    stop = time.perf_counter()
    a, b = 1e3 * (middle - started) / models, 1e3 * (stop - middle) / alone
    print(f"{models} models of {ALPHA:.0%} of the data on {torch.get_num_threads()} thread(s), {STACK} at once: {a:.2f} ms per model")
    print(f"one by one ({alone} of them): {b:.2f} ms per model, x {b / a:.1f}")
    print(f"largest difference of a measurement: {float((together[:alone] - single).abs().max()):.1e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("subsets", 60), ("seeds", 16), ("models", 8), ("queries", 100), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--measurement", choices=["loss", "margin"], default="margin")
    parser.add_argument("--methods", nargs="*", help="names of the ladder; all when absent")
    parser.add_argument("--timing", action="store_true")
    parser.add_argument("--network", choices=["mlp", "cnn"], default="mlp", help="what is timed")
    parser.add_argument("--out", type=Path, help="a JSON file")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    problem = Digits(queries=given.queries, measurement=given.measurement)
    if given.timing:
        timing(problem if given.network == "mlp" else DigitsCNN(queries=given.queries), 2 * STACK, 16)
        return
    chosen, measured, seconds = ground_truth(problem, given.subsets, given.seeds)
    top, _ = mean_ceiling(measured)
    count = given.subsets * given.seeds
    print(f"{count} models retrained in {seconds:.1f} s, {1e3 * seconds / count:.1f} ms each; noise ceiling {top:.3f}", flush=True)
    ladder = [table for table in LADDER if not given.methods or table["name"] in given.methods]
    started = time.perf_counter()
    scores = []
    for seed in range(given.models):
        scores.append(influence(problem, seed, ladder))
        print(f"attributed at {seed + 1} models, {time.perf_counter() - started:.0f} s", flush=True)
    scores = np.stack(scores)
    single, mean = lds(scores, chosen, measured).mean((0, 2)), scores.mean(0)
    ensemble, draws = lds(mean, chosen, measured).mean(1), bootstrap(mean, chosen, measured, draws=300)
    print(f"| method | damping | LDS, single model | {given.models} models | 95% | share of the ceiling |\n|---|---|---|---|---|---|")
    for m, table in enumerate(ladder):
        bounds = interval(draws[m], ensemble[m])
        print(
            f"| {table['name']} | {table.get('damping', '')} | {single[m]:.3f} | {ensemble[m]:.3f} | {bounds.low:.3f} .. {bounds.high:.3f} "
            f"| {ensemble[m] / top:.2f} |"
        )
    if given.out:
        rows = [{**table, "single": s, "ensemble": e} for table, s, e in zip(ladder, single.tolist(), ensemble.tolist(), strict=True)]
        given.out.write_text(json.dumps({"protocol": vars(given) | {"out": ""}, "ceiling": top, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
