"""Time Kronfluence's EK-FAC on a fixed case; run it inside the peers' own virtual environment.

    python -m tests.benchmarks.peer_kronfluence --case D --threads 1 --fisher empirical --damping heuristic

From the repository's root. Prints one JSON line:

    fit_seconds     covariances + eigendecompositions + Lambda, as their Analyzer does them
    score_seconds   pairwise scores of all queries x all training examples
    peak_rss_mb     highest resident memory of the process, in 10^6 bytes; start_rss_mb: the same before the first call
    spearman        per-query rank correlation with the truths, mean and least, where there is a truth for these settings

--loss-dtype float64 for comparing ranks: in float32 the loss of a well-classified example has a gradient of softmax - 1 that is mostly
rounding, which puts the scores of such a query in random order.

Only their computation is timed: the library is imported, and model and data are in memory. The factors and scores that they write go
to a temporary folder; that is part of their time, as it is for their users. Scores are saved as they give them: + g_q^T M^-1 g_i.
"""

import argparse
import gc
import json
import os
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1", DO_NOT_TRACK="1", TOKENIZERS_PARALLELISM="false")

import numpy as np
import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from kronfluence.utils.common import factor_arguments, score_arguments
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tests import cases

# Of the model; their bfloat16 is autocast.
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.float32, "bfloat16-smart": torch.float32}
# Examples per batch in fitting, per query batch and per training batch in scoring: the fastest of those tried on one thread.
BATCHES = {"d": (512, 360, 512), "D": (512, 360, 512), "C": (256, 360, 128), "T": (16, 64, 16)}


class CaseTask(Task):
    """Cross-entropy, of a class or of the next tokens, summed over the batch."""

    def __init__(self, layers: list[str] | None, loss_dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = layers
        self.loss_dtype = loss_dtype

    def compute_train_loss(self, batch: list[Tensor], model: nn.Module, sample: bool = False) -> Tensor:
        inputs, targets = batch
        outputs = model(inputs).to(self.loss_dtype)
        return cases.loss(outputs, draw(outputs, targets) if sample else targets).sum()

    def compute_measurement(self, batch: list[Tensor], model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str] | None:
        return self.layers


def draw(outputs: Tensor, targets: Tensor) -> Tensor:
    """Labels drawn from the model; in case T the token after position t is drawn from the outputs at t."""
    with torch.no_grad():
        drawn = torch.multinomial(outputs.softmax(-1).flatten(0, -2), 1).view(outputs.shape[:-1])
        if targets.ndim == 1:
            return drawn
        return torch.cat([targets[:, :1], drawn[:, :-1]], 1)


def arguments(fisher: str, dtype: str, damping: float | None) -> tuple[FactorArguments, ScoreArguments]:
    """Their own presets: the defaults, all or part in bfloat16, and everything float64 for comparing numbers."""
    prefix = {"float32": "default", "float64": "pytest", "bfloat16": "all_low_precision", "bfloat16-smart": "smart_low_precision"}[dtype]
    factors = getattr(factor_arguments, f"{prefix}_factor_arguments")()
    scores = getattr(score_arguments, f"{prefix}_score_arguments")(damping)
    factors.use_empirical_fisher = fisher == "empirical"
    return factors, scores


def measure(case: cases.Case, options: argparse.Namespace, folder: str) -> tuple[dict[str, float], Tensor]:
    """Fit and score once; seconds and the scores (Q, N)."""
    task = CaseTask(cases.tracked_layers(case.model) if case.name == "T" else None, DTYPES[options.loss_dtype])
    analyzer = Analyzer("peer", prepare_model(case.model, task), task, cpu=True, log_level=50, disable_tqdm=True, output_dir=folder)
    size = options.sequences or len(case.train_inputs)
    train = TensorDataset(case.train_inputs[:size], case.train_targets[:size])
    queries = TensorDataset(case.query_inputs, case.query_targets)
    fit_batch, query_batch, train_batch = options.batches or BATCHES[case.name]
    damping = None if options.damping == "heuristic" else case.fix_damping
    factor_args, score_args = arguments(options.fisher, options.dtype, damping)

    def run(name: str, train: TensorDataset, queries: TensorDataset) -> tuple[float, float]:
        begin = time.perf_counter()
        analyzer.fit_all_factors(name, train, per_device_batch_size=fit_batch, factor_args=factor_args)
        middle = time.perf_counter()
        analyzer.compute_pairwise_scores(
            name,
            name,
            queries,
            train,
            per_device_query_batch_size=query_batch,
            per_device_train_batch_size=train_batch,
            score_args=score_args,
        )
        return middle - begin, time.perf_counter() - middle

    if options.warm_up:
        run("warm_up", TensorDataset(*train[:4]), TensorDataset(*queries[:2]))
    gc.collect()  # as in ours.py
    start = peak_rss_mb()
    fit, score = run("timed", train, queries)
    measured = {"fit_seconds": fit, "score_seconds": score, "peak_rss_mb": peak_rss_mb(), "start_rss_mb": start}
    return measured, analyzer.load_pairwise_scores("timed")["all_modules"]


def peak_rss_mb() -> float:
    """Highest resident memory so far, in 10^6 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def spearman(x: Tensor, y: Tensor) -> Tensor:
    """Rank correlation along the last axis, ties in order of appearance: (Q,)."""
    ranks = [v.argsort(-1).argsort(-1).double() for v in (x, y)]
    x, y = (r - r.mean(-1, keepdim=True) for r in ranks)
    return (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))


def agreement(case: cases.Case, options: argparse.Namespace, scores: Tensor) -> dict[str, float]:
    """Against the truth for these settings; a truth is fitted on all training examples, so a part of them agrees less."""
    labels = "emp" if options.fisher == "empirical" else "exp"
    truth = case.truth.get(f"ekfac_{labels}_{'heur' if options.damping == 'heuristic' else 'fix'}")
    if truth is None:
        return {}
    wanted, found = -truth[:, : scores.shape[1]] * len(case.train_inputs), scores[: len(truth)].double()
    rank = spearman(found, wanted)
    relative = float((found - wanted).norm() / wanted.norm())
    return {"spearman_mean": float(rank.mean()), "spearman_least": float(rank.min()), "relative_error": relative}


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=sorted(BATCHES), required=True)
    parser.add_argument("--cases", type=Path, help="folder of the cases; default: tests/data, and $TDA_CASES for T")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fisher", choices=["empirical", "sampled"], default="empirical")
    parser.add_argument("--damping", choices=["heuristic", "fix"], default="heuristic")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="bfloat16: their all-low-precision preset")
    parser.add_argument("--loss-dtype", choices=["float32", "float64"], default="float32", help="of the outputs inside the loss")
    parser.add_argument("--sequences", type=int, help="only the first so many training examples")
    parser.add_argument("--batches", type=int, nargs=3, metavar=("FIT", "QUERY", "TRAIN"))
    parser.add_argument("--onednn", action="store_true", help="send float32 matrix products to oneDNN")
    parser.add_argument("--no-warm-up", dest="warm_up", action="store_false", help="time the first call of the process")
    parser.add_argument("--save", type=Path, help="write the scores (Q, N) to this .npy file")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Measure one setting and print the JSON line."""
    options = parse(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)  # theirs, of a torch that deprecates a name they use
    torch.set_num_threads(options.threads)
    if options.onednn:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    case = cases.load_case(options.case, DTYPES[options.dtype], options.cases)
    with tempfile.TemporaryDirectory() as folder:
        measured, scores = measure(case, options, folder)
    if options.save:
        np.save(options.save, scores.float().numpy() if options.dtype != "float64" else scores.numpy())
    settings = {key: getattr(options, key) for key in ("case", "threads", "fisher", "damping", "dtype", "loss_dtype", "onednn")}
    print(json.dumps({"peer": "kronfluence", **settings, "shape": list(scores.shape), **measured, **agreement(case, options, scores)}))


if __name__ == "__main__":
    main(sys.argv[1:])
