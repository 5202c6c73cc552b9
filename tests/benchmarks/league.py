"""The league tables of docs/league.md, in Markdown, from the latest evaluation of a run.

tda evaluate docs/examples/evaluate-mlp-full.toml
python -m tests.benchmarks.league ./store
python -m tests.benchmarks.league ./store --run 20261122 --checks
"""

import argparse

import numpy as np

import tda


def number(value, digits=3):
    """A number, or a dash where there is none."""
    return f"{value:.{digits}f}" if np.isfinite(value) else "-"


def cell(league, metric):
    """A metric with its interval."""
    low, high = (float(league.sel(metric=metric, statistic=bound)) for bound in ("low", "high"))
    interval = f" ({low:.3f} .. {high:.3f})" if np.isfinite(low) else ""
    return number(float(league.sel(metric=metric, statistic="estimate"))) + interval


def rows(data, alpha, metrics):
    """One row per method of the table, the best first."""
    shown = data.chosen.values
    league = data.league.sel(alpha=alpha).isel(method=np.flatnonzero(shown)).load()
    lds = league.sel(metric="lds", statistic="estimate").values
    for place in np.argsort(-lds):
        one = league.isel(method=int(place))
        label = one.method.item()
        known = data.sel({"method": label})
        seconds = number(float(known.seconds), 0)
        yield [str(known.family.values), str(known.damping.values), *(cell(one, metric) for metric in metrics), seconds]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--run", default="latest")
    parser.add_argument("--checks", action="store_true", help="the other metrics")
    given = parser.parse_args()
    run = tda.open_run(given.store, given.run)
    data = run.evaluation
    many = "single_lds" in data.metric.values
    lds = ["lds", "of_ceiling", *(["single_lds"] if many else [])]
    others = [m for m in data.metric.values if m not in ("lds", "of_ceiling", "single_lds", "tuning_lds", "behind")]
    told = np.isfinite(data.league.sel(statistic="estimate")).any(["method", "alpha"]).to_series()
    metrics = [metric for metric in (others if given.checks else lds) if told[metric]]
    for alpha in data.alpha.values[: 1 if given.checks else None]:
        if not given.checks:
            print(f"\nalpha = {alpha:g}, noise ceiling {float(data.mean_ceiling.sel(alpha=alpha)[0]):.3f}\n")
        print("| method | damping | " + " | ".join(metrics) + " | seconds |\n" + "|---" * (len(metrics) + 3) + "|")
        for cells in rows(data, alpha, metrics):
            print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
