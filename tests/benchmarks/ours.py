"""Time our EK-FAC on a fixed case, as peer_kronfluence.py times theirs.

    python -m tests.benchmarks.ours --case D --threads 1

Prints one JSON line: fit_seconds, score_seconds, peak_rss_mb, start_rss_mb as there, and the floating-point operations (10^9) of the
matrix products and convolutions that the algorithm needs, counted in a second, untimed pass with --count.
"""

import argparse
import gc
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import tda
from tda import sizes
from tda.attributed import Attributed
from tda.curvature.fit import fit_factors
from tda.data import batches
from tda.device import device_here, named, ready
from tda.directions import HELD_BYTES, Direction, held, query_gradients
from tda.methods import EKFAC
from tda.methods.work import Work
from tda.modules import inspect
from tda.scoring import Scorer, score
from tda.spooled import Met, spooled
from tests import cases

TRACKED = ("*.query_key_value", "*.dense", "*.dense_h_to_4h", "*.dense_4h_to_h")


class Examples:
    """Two tensors as a map-style dataset."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.inputs[i], self.targets[i]


class CaseProblem(tda.Problem):
    """A fixed case. Tokens are labelled with the token that follows; the last has no label."""

    def __init__(self, case: cases.Case, limit: int | None = None, queries: int | None = None) -> None:
        self.case, self.limit = case, limit
        self.asked = torch.arange(queries or len(case.query_inputs)) % len(case.query_inputs)
        self.likelihood = tda.TokenCategorical() if case.name == "T" else tda.Categorical()

    def model(self) -> torch.nn.Module:
        return self.case.model

    def train_data(self) -> Examples:
        return self._examples(self.case.train_inputs[: self.limit], self.case.train_targets[: self.limit])

    def query_data(self) -> Examples:
        return self._examples(self.case.query_inputs[self.asked], self.case.query_targets[self.asked])

    def _examples(self, inputs: Tensor, targets: Tensor) -> Examples:
        if self.case.name == "T":
            targets = torch.cat([targets[:, 1:], targets.new_full((len(targets), 1), -100)], 1)
        return Examples(inputs, targets)


def prepared(
    case: cases.Case, limit: int | None = None, queries: int | None = None, device: str = "cpu"
) -> tuple[Attributed, Examples, Examples]:
    """The case cut into blocks on a device, and its data."""
    problem = CaseProblem(case, limit, queries)
    train = problem.train_data()
    return (
        inspect(problem, problem.model().to(ready(device_here(device))), train, modules=TRACKED if case.name == "T" else ("*",)),
        train,
        problem.query_data(),
    )


def measure(case: cases.Case, options: argparse.Namespace) -> tuple[dict[str, float], Tensor]:
    """Fit and score once; seconds and the scores (Q, N)."""
    attributed, train, queries = prepared(case, options.sequences, options.queries, options.device)
    attributed = replace(attributed, autocast=getattr(torch, options.autocast)) if options.autocast else attributed
    itemsize = torch.finfo(attributed.dtype).bits // 8
    batch_size = options.batch_size or sizes.batch_size(attributed.blocks, attributed.outputs, itemsize=itemsize)
    scoring = options.scoring_batch or sizes.scoring_batch(
        attributed.blocks, batch_size, len(queries), [options.query_rank], itemsize=itemsize
    )
    damping = "heuristic" if options.damping == "heuristic" else case.fix_damping
    method = EKFAC(fisher=options.fisher, damping=damping, separable=options.separable, query_rank=options.query_rank)
    products = options.products

    def fit() -> list[Any]:
        return fit_factors(attributed, train, fisher=options.fisher, batch_size=batch_size, products=products)

    shape: dict[str, Any] = {"itemsize": itemsize}
    shard = sizes.shard_size(len(train))
    many = options.query_block or sizes.query_block(attributed.blocks, len(queries), [options.query_rank], shard, **shape)
    at_once = sizes.made_block(attributed.blocks, len(queries), method.vectors + 1, shared=method.shares_passes, **shape)

    def scores(factors: list[Any]) -> Tensor:
        return torch.cat([scores_of(factors, some) for some in batches(range(len(queries)), many)])

    def made(factors: list[Any], some: Sequence[int]) -> list[Direction]:
        gradients, _ = query_gradients(attributed, queries, some, batch_size=batch_size)
        return method.directions(Work(attributed, train, [factors], 0, batch_size, products), gradients).passes[0]

    def scores_of(factors: list[Any], some: Sequence[int]) -> Tensor:
        if len(some) * itemsize * sum(block.size for block in attributed.blocks) <= HELD_BYTES:
            directions: Sequence[Met] = held(attributed.blocks, made(factors, some))
        else:
            parts = (made(factors, each) for each in batches(some, at_once))
            directions = spooled(attributed.blocks, parts, len(some), rank=options.query_rank)
        scorer = Scorer(method.title, directions, torch.ones(len(some)))
        ids = range(len(train))
        how: dict[str, Any] = {"batch_size": scoring, "products": products, "self_influence": False}
        return score(attributed, [scorer], train, ids, examples=len(train), **how).influence[0]

    if options.warm_up:
        small, _, few = prepared(case, 4, device=options.device)
        fit_factors(small, Examples(train.inputs[:4], train.targets[:4]), fisher=options.fisher, batch_size=4, products=products)
        query_gradients(small, few, range(2), batch_size=2)
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flop})
    gc.collect()  # the imports' garbage: collected by chance within the timing, it would cost 0.1 s
    start = peak_rss_mb()
    fit_seconds, factors, fit_gflop = timed(fit, counter if options.count else None)
    score_seconds, found, score_gflop = timed(lambda: scores(factors), counter if options.count else None)
    if attributed.device.type == "cuda":
        found, peak = found.cpu(), {"peak_gpu_mb": torch.cuda.max_memory_allocated() / 1e6}
    else:
        peak = {}
    seconds = peak | {"fit_seconds": fit_seconds, "score_seconds": score_seconds, "peak_rss_mb": peak_rss_mb(), "start_rss_mb": start}
    return seconds | ({"fit_gflop": fit_gflop, "score_gflop": score_gflop} if options.count else {}), found


def _addmm_flop(_: Any, a: Any, b: Any, **__: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def timed(function: Callable[[], Any], counter: FlopCounterMode | None) -> tuple[float, Any, float]:
    """Seconds, the result and, where a counter is given, the operations in 10^9."""
    begin, spent = time.perf_counter(), time.process_time()
    if counter is None:
        result = function()
        if torch.cuda.is_available():  # what was asked for is done, not only begun
            torch.cuda.synchronize()
        print(f"processor seconds: {time.process_time() - spent:.2f}", file=sys.stderr)
        return time.perf_counter() - begin, result, 0.0
    with counter:
        result = function()
    return time.perf_counter() - begin, result, counter.get_total_flops() / 1e9


def peak_rss_mb() -> float:
    """Highest resident memory so far, in 10^6 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=sorted(cases.FIX_DAMPING), required=True)
    parser.add_argument("--cases", type=Path, help="folder of the cases; default: tests/data, and $TDA_CASES for T")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fisher", choices=["empirical", "sampled", "exact"], default="empirical")
    parser.add_argument("--damping", choices=["heuristic", "fix"], default="heuristic")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--products", choices=["full", "bfloat16"], default="full")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--autocast", nargs="?", const="bfloat16", choices=["bfloat16", "float16"], help="layers forwards and backwards in bfloat16"
    )
    parser.add_argument("--separable", type=float, default=0.0, help="relative error allowed for 1 / (Lambda + lambda) in separable form")
    parser.add_argument("--query-rank", type=int, help="keep each layer's directions in so many terms")
    parser.add_argument("--queries", type=int, help="so many queries: the case's, again and again")
    parser.add_argument("--query-block", type=int, help="queries that are scored at a time; default: as a run chooses")
    parser.add_argument("--sequences", type=int, help="only the first so many training examples")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--scoring-batch", type=int)
    parser.add_argument("--count", action="store_true", help="count operations; the timings are then meaningless")
    parser.add_argument("--no-warm-up", dest="warm_up", action="store_false", help="time the first call of the process")
    parser.add_argument("--save", type=Path, help="write the scores (Q, N) to this .npy file")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Measure one setting and print the JSON line."""
    options = parse(argv)
    torch.set_num_threads(options.threads)
    case = cases.load_case(options.case, getattr(torch, options.dtype), options.cases)
    measured, scores = measure(case, options)
    if options.save:
        np.save(options.save, scores.numpy())
    settings = {
        key: getattr(options, key)
        for key in ("case", "threads", "fisher", "damping", "dtype", "products", "separable", "autocast", "query_rank")
    }
    print(json.dumps({"ours": "tda", "device": named(options.device), **settings, "shape": list(scores.shape), **measured}))


if __name__ == "__main__":
    main(sys.argv[1:])
