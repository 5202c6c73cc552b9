"""This machine's rate of matrix products: the yardstick for the share that an algorithm reaches.

    python -m tests.benchmarks.gemm --threads 1

Prints one JSON line, GFLOP/s by kind of product, size x size:

    float32            torch's default (MKL)
    float32_onednn     the same product sent to oneDNN by torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    bfloat16           bfloat16 operands, accumulated in float32, bfloat16 result
    float64            float64

and `onednn_relative_error`, the error of float32_onednn against float64: near 1e-7 where oneDNN still computes in float32, near 1e-3
where the processor has bfloat16 tiles and the setting takes it at its word.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

KINDS = {"float32": torch.float32, "float32_onednn": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def gemm_rate(kind: str = "float32", threads: int = 1, size: int = 1024, repeats: int = 7, seconds: float = 0.05) -> float:
    """GFLOP/s of a size x size product: the median of `repeats` timings of at least `seconds` each.

    Raises:
        ValueError: kind is not one of KINDS.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    x, y = operands(size, KINDS[kind])
    out = torch.empty_like(x)
    with torch_threads(threads), onednn(enabled=kind == "float32_onednn"), torch.no_grad():
        torch.mm(x, y, out=out)  # the first product sets the kernel up
        calls = max(1, round(seconds / timed(x, y, out, 1)))
        rates = [2 * size**3 * calls / timed(x, y, out, calls) / 1e9 for _ in range(repeats)]
    return statistics.median(rates)


def onednn_relative_error(size: int = 512) -> float:
    """Frobenius error of a float32 product under the oneDNN setting, relative to the product in float64."""
    x, y = operands(size, torch.float32)
    exact = x.double() @ y.double()
    with onednn(enabled=True):
        found = (x @ y).double()
    return float((found - exact).norm() / exact.norm())


def operands(size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two normal matrices (size, size)."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, size, size, generator=generator)
    return x.to(dtype), y.to(dtype)


def timed(x: Tensor, y: Tensor, out: Tensor, calls: int) -> float:
    """Seconds that the products take."""
    begin = time.perf_counter()
    for _ in range(calls):
        torch.mm(x, y, out=out)
    return time.perf_counter() - begin


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Run with so many threads inside a product, then as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def onednn(*, enabled: bool) -> Iterator[None]:
    """Send float32 products to oneDNN, then put the setting back."""
    setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    if enabled:
        setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


def main(argv: list[str]) -> None:
    """Measure every kind and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--size", type=int, default=1024)
    options = parser.parse_args(argv)
    rates = {kind: round(gemm_rate(kind, options.threads, options.size), 1) for kind in KINDS}
    print(json.dumps({"threads": options.threads, "size": options.size, "gflops": rates, "onednn_relative_error": onednn_relative_error()}))


if __name__ == "__main__":
    main(sys.argv[1:])
