"""Fits and scores on a GPU beside the same on the processor: `python -m tests.benchmarks.gpu`, or `make bench-gpu`.

Each setting is a process of `tests.benchmarks.ours`. Printed are the device's name, seconds of fit and scores, how many times as fast as
the processor with --threads threads, and how far the scores are from the processor's in float32: the relative error of the largest, and
the lowest rank correlation of a query.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

#: What layers and products are computed in, by the name of a row.
SETTINGS: dict[str, tuple[str, ...]] = {
    "float32": (),
    "bfloat16 products": ("--products", "bfloat16"),
    "bfloat16 products and layers": ("--products", "bfloat16", "--autocast"),
    "float16 layers": ("--autocast", "float16"),
}


def measured(case: str, device: str, threads: int, more: tuple[str, ...] = ()) -> tuple[dict[str, Any], np.ndarray]:
    """One process: what it printed, and its scores (query, train)."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "scores.npy"
        arguments = ("--case", case, "--device", device, "--threads", str(threads), "--save", str(file), *more)
        out = subprocess.run([sys.executable, "-m", "tests.benchmarks.ours", *arguments], stdout=subprocess.PIPE, check=True, text=True)
        return json.loads(out.stdout.splitlines()[-1]), np.load(file)


def main() -> int:
    """Measure what there is; 1 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of the processor that a GPU is compared with")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU that torch can use on this machine: nothing is measured; `tda doctor` says why", file=sys.stderr)
        return 1
    for case in ("D", "C", *(["T"] if os.environ.get("TDA_CASES") else [])):
        plain, truth = measured(case, "cpu", options.threads)
        for name, more in SETTINGS.items():
            told, scores = measured(case, options.device, options.threads, more)
            ranks = min(float(spearmanr(a, b).statistic) for a, b in zip(scores, truth, strict=True))
            error = float(np.abs(scores - truth).max() / np.abs(truth).max())
            memory = f", {told['peak_gpu_mb']:.0f} MB" if "peak_gpu_mb" in told else ""
            fit, score = (f"{told[k]:.3f} s ({plain[k] / told[k]:.1f}x)" for k in ("fit_seconds", "score_seconds"))
            print(f"{told['device']}, case {case}, {name}: fit {fit}, scores {score}{memory}, error {error:.1e}, Spearman >= {ranks:.5f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
