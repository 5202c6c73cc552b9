"""Our EK-FAC against Kronfluence's, in pairs: the two take turns, so that a machine whose speed drifts treats both alike.

    make bench                                          cases D, C and (with $TDA_CASES) T, 400 sequences
    python -m tests.benchmarks.compare --case D --pairs 5

For each case and setting: medians over the pairs of fit and score seconds, the ratio theirs / ours (median of the pairs' ratios), peak
memory, our share of this machine's measured GEMM rate (of the kernels used: oneDNN's float32, or bfloat16) on the operations that our
algorithm needs, and the rank correlation of the two score matrices, per query, mean and least.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from tests import cases
from tests.benchmarks.gemm import gemm_rate

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Group:
    """A way to run the peer on a case, and the ways of ours that take turns with it: name -> options."""

    case: str
    ours: dict[str, tuple[str, ...]]
    theirs: tuple[str, ...] = ()


# Against our bfloat16 products (which keep a rank correlation of .999) stands the peer's full precision: its own bfloat16 ranks examples
# at about .87-.89 to the truth. --all also runs both sides on oneDNN, and both in bfloat16.
GROUPS = (
    Group("D", {"float32": (), "float32, separable 1e-3": ("--separable", "1e-3")}),
    Group("C", {"float32": ()}),
    Group(
        "T",
        {
            "float32": (),
            "bfloat16 products": ("--products", "bfloat16"),
            "bfloat16 products and layers": ("--products", "bfloat16", "--autocast"),
            "rank 32": ("--query-rank", "32"),
        },
    ),
)
MORE = (
    Group("C", {"float32, both on oneDNN": ()}, ("--onednn",)),
    Group("T", {"float32, both on oneDNN": ()}, ("--onednn",)),
    Group("T", {"both bfloat16": ("--products", "bfloat16")}, ("--dtype", "bfloat16")),
)


def run(python: Path, module: str, arguments: list[str], threads: int) -> dict[str, Any]:
    """One process; its JSON line."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [python, "-m", f"tests.benchmarks.{module}", "--threads", str(threads), *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(group: Group, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All figures of one group, a row for each of our settings."""
    common = ["--case", group.case, *(["--sequences", str(options.sequences)] if group.case == "T" else [])]
    theirs: list[dict[str, Any]] = []
    ours: dict[str, list[dict[str, Any]]] = {name: [] for name in group.ours}
    with tempfile.TemporaryDirectory() as folder:
        saved = {name: Path(folder) / f"{i}.npy" for i, name in enumerate([*group.ours, "theirs"])}
        for _ in range(options.pairs):
            for name, arguments in group.ours.items():
                ours[name].append(run(Path(sys.executable), "ours", [*common, *arguments, "--save", str(saved[name])], options.threads))
            # Its loss in float64: the float32 ranks of a well-learnt query are rounding (see peer_kronfluence.py).
            peer = [*common, *group.theirs, "--loss-dtype", "float64", "--save", str(saved["theirs"])]
            theirs.append(run(options.peer, "peer_kronfluence", peer, options.threads))
        scores = {name: np.load(path) for name, path in saved.items()}
    rows = []
    for name, arguments in group.ours.items():
        counted = run(Path(sys.executable), "ours", [*common, *arguments, "--count"], options.threads)
        rate = gemm_rate("bfloat16" if "bfloat16" in arguments else "float32_onednn", options.threads)
        row: dict[str, Any] = {"case": group.case, "setting": name, "pairs": options.pairs, "threads": options.threads, "gemm_gflops": rate}
        row |= {stage: stage_figures(stage, ours[name], theirs, counted[f"{stage}_gflop"], rate) for stage in ("fit", "score")}
        row["peak_rss_mb"] = {"ours": max(r["peak_rss_mb"] for r in ours[name]), "theirs": max(r["peak_rss_mb"] for r in theirs)}
        row["spearman"] = spearman(-scores[name], scores["theirs"])
        if "float32" in group.ours and name != "float32":
            row["spearman_to_our_float32"] = spearman(scores[name], scores["float32"])
        rows.append(row)
    return rows


def stage_figures(stage: str, ours: list[dict[str, Any]], theirs: list[dict[str, Any]], gflop: float, rate: float) -> dict[str, Any]:
    """Medians, the ratio pair by pair, and the share of the GEMM rate."""
    mine, peer = ([r[f"{stage}_seconds"] for r in side] for side in (ours, theirs))
    ratios = [b / a for a, b in zip(mine, peer, strict=True)]
    median = statistics.median(mine)
    return {
        "ours": median,
        "theirs": statistics.median(peer),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "gflop": gflop,
        "gemm_share": gflop / median / rate,
    }


def spearman(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Rank correlation per query, mean and least: (Q, N), (Q, N)."""
    ranks = rank_correlation(x, y)
    return {"mean": float(ranks.mean()), "least": float(ranks.min())}


def rank_correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman per row: (Q, N), (Q, N) -> (Q,)."""
    from scipy.stats import spearmanr

    return np.array([spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)])


def show(rows: list[dict[str, Any]]) -> None:
    """The table."""
    table = Table(title="EK-FAC, one process each, seconds: ours / Kronfluence 1.0.1", title_justify="left")
    for column in ("case", "setting", "fit", "x", "score", "x", "GEMM share fit / score", "peak MB", "Spearman mean / least"):
        table.add_column(column, justify="left" if column in ("case", "setting") else "right")
    for row in rows:
        fit, score, memory, ranks = row["fit"], row["score"], row["peak_rss_mb"], row["spearman"]
        table.add_row(
            row["case"],
            row["setting"],
            f"{fit['ours']:.3g} / {fit['theirs']:.3g}",
            f"{fit['ratio']:.1f}",
            f"{score['ours']:.3g} / {score['theirs']:.3g}",
            f"{score['ratio']:.1f}",
            f"{fit['gemm_share']:.0%} / {score['gemm_share']:.0%}",
            f"{memory['ours']:.0f} / {memory['theirs']:.0f}",
            f"{ranks['mean']:.4f} / {ranks['least']:.4f}",
        )
    Console(width=160).print(table)


def main(argv: list[str]) -> None:
    """Measure the settings asked for, print the table, and write the figures where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", choices=["D", "C", "T"], help="repeatable; default: all that are available")
    parser.add_argument("--all", action="store_true", help="also both sides on oneDNN, and both in bfloat16")
    parser.add_argument("--sequences", type=int, default=400, help="training sequences of case T; 2000 is all")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peer", type=Path, default=ROOT / ".venv-peers" / "bin" / "python", help="the peer's Python")
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args(argv)
    rows = []
    for group in (*GROUPS, *(MORE if options.all else ())):
        if options.case and group.case not in options.case:
            continue
        if missing := cases.available(group.case):
            print(f"left out: {missing}")
            continue
        for row in measure(group, options):
            rows.append(row)
            print(json.dumps(row), flush=True)
    show(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
