"""How fast the solvers come near the exact direction, and what solving queries together saves.

    python -m tests.benchmarks.solvers                              # all tables, minutes on one core
    python -m tests.benchmarks.solvers --figure docs/solvers.svg    # and the figure

1. Error of the direction, ||v - v*|| / ||v*|| averaged over the queries, against gradient evaluations per query, in passes over the
   training set, on `Digits` (MLP, 3,466 parameters) and `DigitsCNN` (3,818). v* is from the dense damped GGN in float64, which is made
   of captured per-example gradients; so are the products here, so that the solvers are compared and not the products' speed.
2. 64 queries solved together by the tuned schedule against 64 solves of one, with the products that a run uses, float32.
3. 64 GGN-vector products against 2 x 64 plain forward and backward passes over the same examples.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tda import flat
from tda.blocks import example_gradients
from tda.curvature.fisher import seeds
from tda.data import batches
from tda.directions import dense, query_gradients
from tda.modules import inspect
from tda.problems.digits import Digits, DigitsCNN
from tda.solvers.astra import NAMED, Schedule, astra
from tda.solvers.cg import conjugate_gradients
from tda.solvers.operator import Operator
from tda.solvers.preconditioner import ekfac_preconditioner
from tda.solvers.sni import neumann
from tda.solvers.system import State, System
from tests.tda.pipeline import fit

#: Queries that are solved together, and those of them whose errors are averaged: other methods solve these alone, which is the same.
QUERIES, SHOWN = 64, 16
MODELS = {"MLP": Digits, "CNN": DigitsCNN}
#: 1 / (eta K) of the training, momentum counted (the ASTRA paper's rule), and 0.1 x the mean eigenvalue (our default).
DAMPINGS = ("1/(eta K)", "heuristic")
ERRORS = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
BUDGETS = (1, 2, 3, 5, 10, 20, 35)
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Setting:
    """A trained model as a system, dense: eigenvalues (D,) and eigenvectors (D, D) of the GGN, exact (query, D)."""

    attributed: Any
    system: System
    factors: Any
    damping: float
    values: Tensor
    vectors: Tensor
    exact: Tensor

    @property
    def ekfac(self) -> Any:
        return ekfac_preconditioner(self.attributed.blocks, self.factors, self.damping)

    def error(self, x: Tensor) -> float:
        some = min(len(x), SHOWN)
        return float(((x[:some] - self.exact[:some]).norm(dim=1) / self.exact[:some].norm(dim=1)).mean())


def trained(problem: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """The problem's model after its own training, with seed 0, cut into blocks; and the training set."""
    torch.manual_seed(0)
    model, data = problem.model(), problem.train_data()
    problem.fit(model, data, seed=0, on_checkpoint=lambda **_: None)
    return inspect(problem, model.to(dtype).eval(), data), data


def settings(problem: Any) -> dict[str, Setting]:
    """The problem at each damping."""
    attributed, data = trained(problem, torch.float64)
    blocks, count = attributed.blocks, len(data)
    gradients, _ = query_gradients(attributed, problem.query_data(), range(QUERIES), batch_size=QUERIES)
    right = flat.flatten(blocks, [dense(g) for g in gradients])
    small = torch.zeros(count, 10, flat.total(blocks))
    matrix = torch.zeros(2 * [flat.total(blocks)], dtype=torch.float64)
    for ids in batches(range(count), 256):
        batch = attributed.load(data, ids)
        tape = attributed.tape(batch)
        for k, (seed, _, last) in enumerate(seeds(problem, tape, batch, ids, "exact", 0)):
            found = [example_gradients(b, pairs).flatten(1) for b, pairs in zip(blocks, tape.pairs(seed, last=last), strict=True)]
            column = torch.cat(found, 1)
            small[ids[0] : ids[-1] + 1, k] = column
            matrix.addmm_(column.T, column, alpha=1 / count)
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp(min=0)

    def product(x: Tensor, ids: Any = None) -> Tensor:
        if ids is None:
            return x @ matrix
        rows = small[list(ids)].flatten(0, 1)
        return (x.float() @ rows.T @ rows).double() / len(ids)

    recipe = problem.recipe()
    steps = recipe.epochs * -(-count // 64)
    dampings = {"1/(eta K)": (1 - 0.9) / (0.05 * steps), "heuristic": 0.1 * float(matrix.diagonal().mean())}
    factors, made = fit(attributed, data, [range(count)], fisher="exact", batch_size=256), {}
    for name, damping in dampings.items():
        system = System(product, torch.tensor(damping, dtype=torch.float64), right, count)
        exact = right @ vectors / (values + damping) @ vectors.T
        made[name] = Setting(attributed, system, factors, damping, values, vectors, exact)
    return made


def path(setting: Setting, solve: Callable[[Callable[[State], None]], Any], first: Tensor | None = None) -> Points:
    """(passes over the training set per query, error) along a solve; first: its start, which costs nothing."""
    points: Points = [] if first is None else [(0.0, setting.error(first))]

    def look(state: State) -> None:
        points.append((float(state["evaluations"][-1]) / setting.system.examples, setting.error(state["x"])))

    solve(look)
    return points


def filtered(setting: Setting) -> Points:
    """SNI on full batches by its closed form (which a test shows it to equal): step size 1 / (1.05 (sigma_max + damping))."""
    vectors, damped = setting.vectors, setting.values + setting.damping
    alpha, turned, points = 1 / (1.05 * float(damped[-1])), setting.system.right[:SHOWN] @ vectors, []
    for steps in sorted({round(10 ** (k / 20)) for k in range(101)}):
        x = turned * (-torch.expm1(steps * torch.log1p(-alpha * damped))) / damped @ vectors.T
        points.append((float(steps), setting.error(x)))
    return points


def methods(setting: Setting) -> dict[str, Points]:
    """The path of every method."""
    system, ekfac = replace(setting.system, right=setting.system.right[:SHOWN]), setting.ekfac
    begin = ekfac(setting.system.right)
    tight: dict[str, Any] = {"tolerance": 1e-5}
    return {
        "SNI, full batch": filtered(setting),
        "SNI, batch 256": path(setting, lambda look: neumann(system, batch_size=256, max_steps=560, on_step=look, **tight)),
        "CG": path(setting, lambda look: conjugate_gradients(system, max_steps=120, on_step=look, **tight)),
        "CG, EK-FAC preconditioner": path(
            setting, lambda look: conjugate_gradients(system, precondition=ekfac, max_steps=200, on_step=look, **tight)
        ),
        "ASTRA, paper": path(setting, lambda look: astra(system, ekfac, schedule=NAMED["paper"], on_step=look, **tight), begin),
        "ASTRA, paper-convnet": path(
            setting, lambda look: astra(system, ekfac, schedule=NAMED["paper-convnet"], on_step=look, **tight), begin
        ),
        "ASTRA, paper with a step from the largest eigenvalue": path(
            setting, lambda look: astra(system, ekfac, schedule=Schedule(200, 256), on_step=look, **tight), begin
        ),
        "ASTRA, tuned": path(setting, lambda look: astra(setting.system, ekfac, schedule=NAMED["tuned"], on_step=look, **tight), begin),
        "ASTRA, tuned, one query at a time": singly(setting),
    }


def singly(setting: Setting) -> Points:
    """The tuned schedule without the queries' help for each other: the mean over the first four."""
    paths = []
    for q in range(4):
        one = replace(setting, system=replace(setting.system, right=setting.system.right[q : q + 1]), exact=setting.exact[q : q + 1])
        paths.append(path(one, lambda look, one=one: astra(one.system, one.ekfac, schedule=NAMED["tuned"], tolerance=1e-5, on_step=look)))
    length = min(len(points) for points in paths)
    return [(paths[0][k][0], sum(points[k][1] for points in paths) / len(paths)) for k in range(length)]


def passes_to(points: Points, error: float) -> float | None:
    """Passes after which the error is within `error` for the first time."""
    return next((passes for passes, found in points if found <= error), None)


def error_at(points: Points, budget: float) -> float:
    """The error of what the budget buys; 1, that of zero, where it buys nothing."""
    return next((found for passes, found in reversed(points) if passes <= budget), 1.0)


def tables(name: str, damping: str, setting: Setting, found: dict[str, Points]) -> None:
    """Print passes by error, and error by budget."""
    print(f"\n{name}, damping {damping} = {setting.damping:.2g}: passes over the training set per query, to an error of\n")
    print("| method | " + " | ".join(f"{e:g}" for e in ERRORS) + " |\n|---" * 1 + "|---" * len(ERRORS) + "|")
    for method, points in found.items():
        passes = [passes_to(points, e) for e in ERRORS]
        print(f"| {method} | " + " | ".join("-" if p is None else f"{p:.3g}" for p in passes) + " |")
    print(f"\n{name}, damping {damping}: error after so many passes per query\n")
    print("| method | " + " | ".join(str(b) for b in BUDGETS) + " |\n|---" * 1 + "|---" * len(BUDGETS) + "|")
    for method in ("ASTRA, paper", "ASTRA, tuned"):
        print(f"| {method} | " + " | ".join(f"{error_at(found[method], b):.2g}" for b in BUDGETS) + " |")


def draw(found: dict[tuple[str, str], dict[str, Points]], to: Path) -> None:
    """The figure: error against passes, one panel per model and damping."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    mpl.rcParams.update({"svg.hashsalt": "solvers", "font.size": 9})
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.5), sharex=True, sharey=True)
    for axis, ((name, damping), paths) in zip(axes.flat, found.items(), strict=True):
        for k, (method, points) in enumerate(paths.items()):
            style = {"linewidth": 2.5, "color": "black"} if method == "ASTRA, tuned" else {"linewidth": 1.2, "color": f"C{k}"}
            axis.plot([max(p, 0.1) for p, _ in points], [e for _, e in points], label=method, **style)
        axis.set(xscale="log", yscale="log", title=f"{name}, damping {damping}", ylim=(1e-4, 3), xlim=(0.1, 1e5))
        axis.grid(visible=True, alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("passes over the training set per query")
    for axis in axes[:, 0]:
        axis.set_ylabel("error of the direction")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncols=3, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.savefig(to, metadata={"Date": None})


def timed(work: Callable[[], Any], repeats: int = 3) -> float:
    """Seconds, the least of some repeats after one that warms up."""
    work()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def speed(name: str, problem: Any) -> None:
    """Print the ratios of (2) and (3)."""
    attributed, data = trained(problem, torch.float32)
    count = len(data)
    gradients, _ = query_gradients(attributed, problem.query_data(), range(QUERIES), batch_size=QUERIES)
    right = flat.flatten(attributed.blocks, [dense(g) for g in gradients])
    factors = fit(attributed, data, [range(count)], fisher="exact", batch_size=256)
    damping = 0.1 * sum(float(f.eigenvalues.sum()) for f in factors) / right.shape[1]
    ekfac = ekfac_preconditioner(attributed.blocks, factors, damping)
    operator = Operator(attributed, data, "ggn", 512)

    def solve(queries: slice) -> tuple[float, float]:
        """Seconds, and the largest residual."""
        started = time.perf_counter()
        system = System(operator.product, torch.tensor(damping), right[queries], count)
        found = astra(system, ekfac, schedule=NAMED["tuned"], tolerance=1e-3)
        return time.perf_counter() - started, float(found.residuals[-1].max())

    operator.product(right[:1])  # what is read and traced once
    together, reached = solve(slice(None))
    single = [solve(slice(q, q + 1)) for q in range(0, QUERIES, 16)]
    alone = sum(seconds for seconds, _ in single) / len(single)
    print(
        f"\n{name}: {QUERIES} queries together {together:.2f} s to residuals of at most {reached:.1e}; one alone {alone:.2f} s to "
        f"{max(r for _, r in single):.1e} (mean of {len(single)}): 1/{QUERIES * alone / together:.1f} of {QUERIES} solves of one"
    )
    batch = attributed.load(data, range(512))
    likelihood = problem.likelihood

    def plain() -> None:
        outputs = problem.predict(attributed.model, batch)
        torch.autograd.grad(likelihood.loss(outputs, batch.targets).sum(), list(attributed.model.parameters()))

    one, products = timed(plain, 20), timed(lambda: operator.product(right, range(512)))
    print(
        f"{name}: {QUERIES} GGN-vector products over 512 examples {products:.3f} s, 2 x {QUERIES} forward and backward passes "
        f"{2 * QUERIES * one:.3f} s: {2 * QUERIES * one / products:.2f} of their speed"
    )


def main(argv: list[str]) -> None:
    """Print every table; with --figure, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=("speed", "errors"), help="half of it")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if options.only != "errors":
        for name, kind in MODELS.items():
            speed(name, kind())
    if options.only == "speed":
        return
    found = {}
    for name, kind in MODELS.items():
        for damping, setting in settings(kind()).items():
            found[name, damping] = methods(setting)
            tables(name, damping, setting, found[name, damping])
    if options.figure:
        draw(found, options.figure)


if __name__ == "__main__":
    main(sys.argv[1:])
