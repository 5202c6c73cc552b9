"""Our chains against devinterp's, in pairs: the two take turns, so that a machine whose speed drifts treats both alike.

    make bench                                                  one pair of each
    python -m tests.benchmarks.sampling --case gpt --pairs 5 --onednn

Draws per second, the losses of all train and query examples evaluated at every one of them and written to Zarr, of one and of eight
chains: median seconds and the ratio pair by pair, of wall time and of processor time (which others on the machine touch less). Same
models, weights, settings, float32 and threads (`sampled.py`). What is done once is in neither side's seconds: of ours, those
until chains can start, a compiler's for GPTs, have a column of their own; --plain does without it. --onednn: the peer's products on
oneDNN, too, as ours are.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.benchmarks import sampled
from tests.benchmarks.compare import ROOT, run

#: Draws of a chain that runs alone: ours, theirs (the two are compared per draw). Of several chains a quarter each.
DRAWS = {"mlp": (400, 80), "gpt32": (40, 40), "gpt": (16, 16), "gpt128": (8, 8)}


def measure(case: str, chains: int, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one setting."""
    mine, peer = (draws if chains == 1 else draws // 4 for draws in DRAWS[case])
    common = ["--case", case, "--chains", str(chains)]
    theirs = ["--draws", str(peer), *common, *(["--onednn"] if options.onednn else [])]
    ours = ["--draws", str(mine), *common, *([] if options.plain or case == "mlp" else ["--compiled"])]
    sides: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}
    for _ in range(options.pairs):
        sides["ours"].append(run(Path(sys.executable), "ours_sampling", ours, options.threads))
        sides["theirs"].append(run(options.peer, "peer_devinterp", theirs, options.threads))
    row: dict[str, Any] = {"case": case, "chains": chains, "pairs": options.pairs, "threads": options.threads, "onednn": options.onednn}
    row |= {"how": sides["ours"][0]["how"], "warm_up": statistics.median(each["warm_up"] for each in sides["ours"])}
    for clock in ("seconds", "processor"):
        each = {side: [r[clock] / r["draws"] for r in found] for side, found in sides.items()}
        ratios = [b / a for a, b in zip(each["ours"], each["theirs"], strict=True)]
        row[clock] = {side: 1 / statistics.median(values) for side, values in each.items()}
        row[clock] |= {"ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)]}
    return row


def show(rows: list[dict[str, Any]]) -> None:
    """The table."""
    table = Table(title="Draws of a chain per second: ours / devinterp 2.0.1", title_justify="left")
    for column in ("case", "chains", "advance", "warm-up s", "wall", "x", "range", "processor", "x", "range"):
        table.add_column(column, justify="left" if column in ("case", "advance") else "right")
    for row in rows:
        clocks = []
        for clock in ("seconds", "processor"):
            found = row[clock]
            low, high = found["ratio_range"]
            clocks += [f"{found['ours']:.3g} / {found['theirs']:.3g}", f"{found['ratio']:.1f}", f"{low:.1f}-{high:.1f}"]
        table.add_row(
            row["case"] + (", both on oneDNN" if row["onednn"] else ""),
            str(row["chains"]),
            row["how"].split(":")[0],
            f"{row['warm_up']:.1f}",
            *clocks,
        )
    Console(width=140).print(table)


def main(argv: list[str]) -> None:
    """Measure the settings asked for, print the table, and write the figures where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", choices=sampled.NAMES, help="repeatable; default: all")
    parser.add_argument("--chains", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--onednn", action="store_true", help="the peer's float32 products on oneDNN, too")
    parser.add_argument("--plain", action="store_true", help="our GPTs without the compiler")
    parser.add_argument("--peer", type=Path, default=ROOT / ".venv-peers" / "bin" / "python", help="the peer's Python")
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args(argv)
    rows = []
    for case in options.case or sampled.NAMES:
        for chains in options.chains:
            rows.append(measure(case, chains, options))
            print(json.dumps(rows[-1]), flush=True)
    show(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
