"""How far could anyone get on the digits' MLP? LDS by the number of models attributed, and by the number of models retrained.

    python -m tests.benchmarks.limits                       # 10 models, 12,000 retrainings: 15 minutes

The protocol is that of tests.benchmarks.lds. Three predictors: the exact GGN's influence averaged over K models trained on everything;
a ridge regression of the margin on which examples were in the subset (a datamodel), from R retrainings that the LDS does not judge by;
the same regression of what the influence leaves unexplained. Ridge and scale are chosen on half of the queries, the others are reported.
"""

import argparse
import time

import numpy as np
import torch

from tda.evaluation.lds import ceiling, lds
from tda.evaluation.retraining import retrained
from tda.evaluation.subsets import masks
from tda.problems.digits import Digits
from tests.benchmarks.lds import ALPHA, ground_truth, influence

RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
GGN = [{"name": "ggn", "damping": 5e-3}]


def datamodels(chosen, measured, prior):
    """Coefficients (ridge, query, train) of a regression on membership, shrunk towards a multiple of `prior` (query, train)."""
    member = chosen - chosen.mean(0)
    wanted = measured - measured.mean(0)
    predicted = member @ prior.T
    scale = (predicted * wanted).sum(0) / np.maximum((predicted**2).sum(0), 1e-30)
    values, vectors = np.linalg.eigh(member.T @ member / len(member))
    left = vectors.T @ (member.T @ (wanted - scale * predicted)) / len(member)
    return np.stack([scale[:, None] * prior + (vectors @ (left / (values + ridge)[:, None])).T for ridge in RIDGES])


def reported(scores, chosen, measured):
    """LDS over the odd queries, of the candidate (candidate, query, train) that is best over the even ones."""
    found = lds(scores, chosen, measured)
    return found[found[:, ::2].mean(1).argmax(), 1::2].mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("subsets", 60), ("seeds", 16), ("models", 10), ("retrainings", 12_000), ("queries", 100), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    problem = Digits(queries=given.queries, measurement="margin")
    train = problem.train_data()
    judged = ground_truth(problem, given.subsets, given.seeds)[:2]
    print(f"noise ceiling over the reported queries: {ceiling(judged[1])[1::2].mean():.3f}", flush=True)

    started = time.perf_counter()
    scores = np.concatenate([influence(problem, seed, GGN) for seed in range(given.models)])
    print(f"({time.perf_counter() - started:.0f} s)\n| models attributed | LDS of the GGN |\n|---|---|")
    curve = {}
    for count in sorted({1, 2, 4, 8, given.models} & set(range(1, given.models + 1))):
        groups = [scores[start : start + count].mean(0) for start in range(0, given.models - count + 1, count)]
        curve[count] = np.mean([reported(group[None], *judged) for group in groups])
        print(f"| {count} | {curve[count]:.3f} |")
    # Noise that is independent between models adds to the variance of their mean as 1 / K.
    slope, limit = np.polyfit([1 / count for count in curve], [1 / found**2 for found in curve.values()], 1)
    print(f"| without end, by 1 / LDS^2 = {limit:.2f} + {slope:.2f} / models | {limit**-0.5:.3f} |", flush=True)

    started = time.perf_counter()
    chosen = masks(len(train), ALPHA, given.retrainings, 1)
    ids = [np.flatnonzero(mask).tolist() for mask in chosen]
    measured = retrained(problem, train, problem.query_data(), ids, [1_000_000 + s for s in range(len(ids))]).double().numpy()
    print(
        f"| models retrained | LDS of a datamodel | shrunk towards the influence |\n|---|---|---|   ({time.perf_counter() - started:.0f} s)"
    )
    mean = scores.mean(0).astype(np.float64)
    for count in (c for c in (500, 2_000, 6_000, 12_000) if c <= given.retrainings):
        some = chosen[:count].astype(np.float64), measured[:count]
        plain, shrunk = (reported(datamodels(*some, prior), *judged) for prior in (np.zeros_like(mean), mean))
        print(f"| {count:,} | {plain:.3f} | {shrunk:.3f} |", flush=True)


if __name__ == "__main__":
    main()
