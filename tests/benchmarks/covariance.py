"""The covariance of 4 x 500 draws of 50,000 training losses with 1,000 queries: its rate, as a share of the GEMM rate, and its memory.

    python -m tests.benchmarks.covariance --threads 1

Prints one JSON line for each number of threads: seconds, GFLOP/s of the products that the definition needs (2 C T n q), the share of the
measured GEMM rate (the kernel used: oneDNN's float32 where it keeps float32) of what gives value and standard error together and of the
products alone, and peak memory above the inputs, outputs included. cpu_share is the same by the processor seconds of this process: the
two differ where others use the machine.
"""

import argparse
import json
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tda.products import fast_float32, onednn_keeps_float32
from tda.sampling.covariance import TILE, covariance
from tests.benchmarks.gemm import gemm_rate, torch_threads

CHAINS, DRAWS, MIB = 4, 500, 1 << 20


def measure(threads: int = 1, *, examples: int = 50_000, queries: int = 1_000, repeats: int = 3) -> dict[str, Any]:
    """Figures of one setting; the GEMM rate is taken before and after each repeat, since a machine's speed drifts."""
    generator = torch.Generator().manual_seed(0)
    train, query = (torch.randn(CHAINS, DRAWS, k, generator=generator) for k in (examples, queries))
    kind = "float32_onednn" if onednn_keeps_float32() else "float32"
    gflop = 2 * CHAINS * DRAWS * examples * queries / 1e9
    runs = {"with_stderr": lambda: covariance(train, query), "without": lambda: products_alone(train, query)}
    found: dict[str, Any] = {"threads": threads, "gflop": gflop, "kernel": kind}
    with torch_threads(threads):
        found["peak_mib_above_inputs"] = round(peak_above(lambda: covariance(train, query)) / MIB)
        rates, processor_rates = [gemm_rate(kind, threads)], [gemm_processor_rate(threads)]
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        processor: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(repeats):
            for name, call in runs.items():
                wall, cpu = time.perf_counter(), time.process_time()
                call()
                seconds[name].append(time.perf_counter() - wall)
                processor[name].append((time.process_time() - cpu) / threads)
                rates.append(gemm_rate(kind, threads))
                processor_rates.append(gemm_processor_rate(threads))
    rate, processor_rate = statistics.median(rates), statistics.median(processor_rates)
    found["gemm_gflops"] = round(rate, 1)
    for name in runs:
        took = statistics.median(seconds[name])
        found[name] = {
            "seconds": round(took, 3),
            "gflops": round(gflop / took, 1),
            "share": round(gflop / took / rate, 3),
            "cpu_share": round(gflop / statistics.median(processor[name]) / processor_rate, 3),
        }
    return found


def gemm_processor_rate(threads: int, size: int = 1024, calls: int = 20) -> float:
    """GFLOP/s of a square product by the processor seconds of this process, for each of its threads, times their number."""
    x, y = torch.randn(2, size, size)
    with fast_float32():
        torch.mm(x, y)
        begin = time.process_time()
        for _ in range(calls):
            torch.mm(x, y)
        return 2 * size**3 * calls * threads / (time.process_time() - begin) / 1e9


def products_alone(train: Tensor, query: Tensor) -> Tensor:
    """The covariance without its standard error: centred, one product of all draws for each tile."""
    right = (query - query.mean(1, keepdim=True)).flatten(0, 1)
    out = right.new_empty(right.shape[1], train.shape[2])
    with fast_float32():
        for start in range(0, train.shape[2], TILE):
            part = train[:, :, start : start + TILE]
            left = (part - part.mean(1, keepdim=True)).flatten(0, 1)
            out[:, start : start + TILE] = torch.mm(right.T, left)
    return out.div_(len(train) * (train.shape[1] - 1))


def peak_above(call: Callable[[], object]) -> int:
    """Bytes of resident memory at the peak of a call, above what was there before it; the result counts."""
    before, peak, over = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.002):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        kept = call()
    finally:
        over.set()
        watcher.join()
    del kept
    return peak - before


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main(argv: list[str]) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(argv)
    for threads in options.threads:
        print(json.dumps(measure(threads, repeats=options.repeats)))


if __name__ == "__main__":
    main(sys.argv[1:])
