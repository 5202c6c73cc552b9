"""SOURCE against influence functions where training stopped early: LDS on digits after 3 epochs with 30% of the labels wrong.

    python -m tests.benchmarks.source                       # a run of docs/examples/digits-early.toml, then 60 subsets x 16 seeds
    python -m tests.benchmarks.source --subsets 30 --seeds 4

The scores come from `tda run`, as a user's would; the truth from retraining on random halves.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

import tda
from tda.evaluation.lds import bootstrap, ceiling, interval, lds
from tda.evaluation.retraining import retrained
from tda.evaluation.subsets import masks, training_seed
from tda.problem import load_problem

CONFIG = Path(__file__).parents[2] / "docs" / "examples" / "digits-early.toml"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("subsets", 60), ("seeds", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--alpha", type=float, default=0.5)
    parser.add_argument("--measurement", choices=["loss", "margin"], default="loss")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        command = [Path(sys.executable).with_name("tda"), "run", CONFIG, "--store", folder]
        command += ["--set", f"problem_options.measurement={given.measurement}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        run = tda.open_run(folder)
        config = run.manifest["config"]
        mean = run.influence.to_numpy()
        single = np.stack([run.member(m).to_numpy() for m in range(config["ensemble"])])
    problem = load_problem(config["problem"], config["problem_options"])
    train = problem.train_data()
    chosen = masks(len(train), given.alpha, given.subsets, 0)
    ids = [np.flatnonzero(mask).tolist() for mask in chosen for _ in range(given.seeds)]
    numbers = [training_seed(0, given.alpha, s, r) for s in range(given.subsets) for r in range(given.seeds)]
    measured = retrained(problem, train, problem.query_data(), ids, numbers).view(given.subsets, given.seeds, -1).numpy()
    print(f"noise ceiling {ceiling(measured).mean():.3f}; {given.measurement}, alpha {given.alpha}, {given.subsets} x {given.seeds}")
    print(f"| method | one model (mean of {len(single)}) | {len(single)} models averaged | 95% over subsets |\n|---|---|---|---|")
    alone = np.stack([lds(each, chosen, measured).mean(-1) for each in single]).mean(0)
    together, draws = lds(mean, chosen, measured).mean(-1), bootstrap(mean, chosen, measured)
    for m, method in enumerate(run.methods):
        span = interval(draws[m], together[m])
        print(f"| {method} | {alone[m]:.3f} | {together[m]:.3f} | {span.low:.3f} to {span.high:.3f} |")
    best = max((m for m in range(len(run.methods)) if "source" not in run.methods[m]), key=lambda m: together[m])
    source = run.methods.index("source")
    gap = interval(draws[source] - draws[best], together[source] - together[best])
    print(f"\nsource minus {run.methods[best]}, the best influence function: {gap.low:+.3f} to {gap.high:+.3f} (95%, paired)")


if __name__ == "__main__":
    main()
