"""How near EK-FAC and the solvers come to the exact damped solve on a language model: 10 queries, 500 candidates, lambda 1e-4.

    python -m tests.benchmarks.neox                          # half an hour of one core
    python -m tests.benchmarks.neox --ways 8 --anywhere 0.1  # a language that is easy to predict
    python -m tests.benchmarks.neox --quick                  # K-FAC, EK-FAC and gradients alone, and a rougher truth

The protocol of 2505.05017: a GPT-NeoX of 2 layers, 256 wide, trained briefly, in one pass over sentences of a generator; the linear layers
of attention and MLPs are attributed. Candidates and curvature are of the first sentences that it was trained on. The truth is the GGN
solve by conjugate gradients, EK-FAC as the preconditioner, run until its ranks do not change any more: the ranks that it had on the way
are told beside it. Told are, for every method, the mean over queries of the rank correlation with it over the candidates, and processor
seconds per pair of query and candidate: fits and directions, and the pass that scores.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import tda
from tda.curvature.fit import fit_factors
from tda.directions import Dense, Direction, query_gradients, squared_norms
from tda.evaluation.lds import spearman
from tda.flat import unflatten
from tda.language.folders import fresh
from tda.language.groups import groups
from tda.methods import parse
from tda.methods.work import Work
from tda.modules import inspect
from tda.problem import Batch
from tda.scoring import Scorer, score

DAMPING = 1e-4
DEPTH, HEADS = 2, 4
CANDIDATES, QUERIES = 500, 10
#: Residuals on the way to the truth, at which its ranks are looked at.
ROUGH = (0.3, 0.1)


class Sentences(tda.Problem):
    """A GPT-NeoX on sentences of a made-up language: every word has `ways` that may follow it, the k-th a k-th as often as the first.

    anywhere: the share of words that come from the whole vocabulary instead. corpus: sentences; train: those that are attributed.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.words, self.length, self.width, self.corpus, self.train = (
            getattr(options, key) for key in ("words", "length", "width", "corpus", "train")
        )
        self.ways, self.anywhere, reduction = options.ways, options.anywhere, options.reduction
        self.likelihood = tda.TokenCategorical(reduction=reduction)  # type: ignore[misc]

    def model(self) -> nn.Module:
        from transformers import GPTNeoXConfig

        sizes = {"hidden_size": self.width, "intermediate_size": 4 * self.width, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS}
        config = GPTNeoXConfig(vocab_size=self.words, max_position_embeddings=self.length, use_cache=False, **sizes)
        return fresh("AutoModelForCausalLM", config)

    def groups(self, model: nn.Module) -> dict[str, tuple[str, ...]]:
        return groups(model)

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        logits: Tensor = model(input_ids=batch.inputs).logits
        return logits

    @cached_property
    def _drawn(self) -> Tensor:
        """(corpus + queries, length + 1): first the candidates, the queries last."""
        random = np.random.Generator(np.random.Philox(0))
        follow = random.integers(0, self.words, (self.words, self.ways))
        share = 1 / np.arange(1, self.ways + 1)
        found = np.empty((self.corpus + QUERIES, self.length + 1), np.int64)
        found[:, 0] = random.integers(0, self.words, len(found))
        for t in range(self.length):
            ways = random.choice(self.ways, len(found), p=share / share.sum())
            anywhere = random.random(len(found)) < self.anywhere
            found[:, t + 1] = np.where(anywhere, random.integers(0, self.words, len(found)), follow[found[:, t], ways])
        return torch.from_numpy(found)

    def _data(self, rows: Tensor) -> torch.utils.data.TensorDataset:
        return torch.utils.data.TensorDataset(rows[:, :-1], rows[:, 1:])

    def train_data(self) -> torch.utils.data.TensorDataset:
        return self._data(self._drawn[: self.train])

    def query_data(self) -> torch.utils.data.TensorDataset:
        return self._data(self._drawn[self.corpus :])

    def sentences(self) -> torch.utils.data.TensorDataset:
        """All that the model is trained on."""
        return self._data(self._drawn[: self.corpus])


def trained(problem: Sentences, epochs: int) -> nn.Module:
    """The model after some epochs of Adam."""
    torch.manual_seed(0)
    model, (inputs, targets) = problem.model(), problem.sentences().tensors
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(epochs):
        for ids in torch.randperm(len(inputs)).split(32):
            optimizer.zero_grad()
            logits = problem.predict(model, Batch(inputs[ids], targets[ids]))
            loss = cross_entropy(logits.flatten(0, 1), targets[ids].flatten())
            loss.backward()
            optimizer.step()
    held, answers = problem.query_data().tensors
    with torch.no_grad():
        lost = cross_entropy(problem.predict(model.eval(), Batch(held, answers)).flatten(0, 1), answers.flatten())
    print(f"{epochs} passes over {len(inputs):,} sentences: {float(loss.detach()):.2f} nats per token, {float(lost):.2f} on the queries")
    return model


class Bench:
    """One model, cut into blocks, with what methods share."""

    def __init__(self, problem: Sentences, model: nn.Module, modules: Sequence[str], batch_size: int) -> None:
        self.train, self.batch_size = problem.train_data(), batch_size
        self.attributed = inspect(problem, model, self.train, modules=modules)
        self.gradients, _ = query_gradients(self.attributed, problem.query_data(), range(QUERIES), batch_size=QUERIES)
        started = time.process_time()
        self.factors = fit_factors(self.attributed, self.train, fisher="sampled", batch_size=batch_size)
        self.fit_seconds = time.process_time() - started

    def scores(self, table: dict[str, Any], on_step: Any = None) -> tuple[np.ndarray, float, dict[str, Any]]:
        """Scores (query, candidate) of a method, its processor seconds, and what it tells of its solve."""
        method = parse(table)
        work = Work(self.attributed, self.train, [self.factors] * len(method.fits), 0, self.batch_size, on_step=on_step)
        started = time.process_time()
        made = method.directions(work, self.gradients)
        found = self.scored(made.passes[0], cosine=method.cosine)
        return found, time.process_time() - started + (self.fit_seconds if method.fits else 0.0), made.told

    def scored(self, directions: Sequence[Direction], *, cosine: bool = False) -> np.ndarray:
        """Scores (query, candidate) of directions."""
        norms = torch.stack([squared_norms(g) for g in self.gradients]).sum(0).sqrt()
        scorer = Scorer("", directions, norms, cosine=cosine)
        options: dict[str, Any] = {"examples": len(self.train), "batch_size": self.batch_size, "self_influence": False}
        found: np.ndarray = score(self.attributed, [scorer], self.train, range(CANDIDATES), **options).influence[0].double().numpy()
        return found

    def truth(self, tolerance: float, steps: int, damping: float) -> tuple[list[tuple[str, np.ndarray, float, dict[str, Any]]], np.ndarray]:
        """Rows of the exact solve and of where it was on the way, and its scores."""
        started, caught = time.process_time(), dict[float, tuple[Tensor, float]]()

        def look(state: dict[str, Tensor]) -> None:
            at, left = int(state["step"]), float(state["residuals"][-1].max())
            if at % 5 == 0:
                print(f"  step {at}: residual at most {left:.1e}, {time.process_time() - started:.0f} s", flush=True)
            for some in ROUGH:
                if left <= some and some not in caught and some > tolerance:
                    caught[some] = (state["x"].clone(), time.process_time() - started)

        table = {"name": "cg", "damping": damping, "preconditioner": "ekfac", "tolerance": tolerance, "max_steps": steps}
        found = self.scores(table, look)
        rows = [("CG, EK-FAC as preconditioner", *found)]
        for some, (x, spent) in caught.items():
            directions = [Dense(-matrix) for matrix in unflatten(self.attributed.blocks, x)]
            rows.append((f"the same, when its residual was {some:g}", self.scored(directions), spent + self.fit_seconds, {}))
        return rows, found[0]


def residual(told: dict[str, Any], examples: int) -> str:
    """The largest relative residual of the queries at the end, and how many products with the curvature of all examples each took."""
    if not told:
        return ""
    solve = told["solves"][0]
    return f"{max(solve['residual'][-1]):.1e} after {solve['evaluations'][-1] / examples:.0f} passes"


def main(argv: list[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--damping", type=float, default=DAMPING)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--corpus", type=int, default=4000, help="sentences trained on")
    parser.add_argument(
        "--train", type=int, default=CANDIDATES, help="the first of them, of which the curvature is; the first 500 are scored"
    )
    parser.add_argument("--words", type=int, default=1024)
    parser.add_argument("--ways", type=int, default=256, help="words that may follow a word")
    parser.add_argument("--anywhere", type=float, default=0.2, help="share of words that follow none of these rules")
    parser.add_argument("--length", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--reduction", choices=("mean", "sum"), default="mean")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--truth", type=float, default=0.03, help="residual of the exact solve")
    parser.add_argument("--steps", type=int, default=2000, help="most steps of the exact solve")
    parser.add_argument("--plain", type=int, default=20, help="steps of CG without a preconditioner")
    parser.add_argument("--lissa", type=int, default=300, help="steps of LiSSA, of 32 candidates each")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    problem = Sentences(options)
    model = trained(problem, options.epochs)
    bench = Bench(problem, model, ["mlp", "attention"], 100)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters; curvature of {options.train * options.length:,} tokens", flush=True)
    rows, truth = bench.truth(ROUGH[0] / 2 if options.quick else options.truth, options.steps, options.damping)
    cheap: dict[str, dict[str, Any]] = {
        "EK-FAC": {"name": "ekfac", "damping": options.damping},
        "K-FAC": {"name": "kfac", "damping": options.damping},
        "GradDot": {"name": "graddot"},
        "GradCos": {"name": "gradcos"},
    }
    solvers: dict[str, dict[str, Any]] = {
        "ASTRA, tuned": {"name": "astra", "damping": options.damping, "tolerance": 0.1},
        "ASTRA, paper-gpt2": {"name": "astra", "damping": options.damping, "schedule": "paper-gpt2"},
        f"CG, {options.plain} steps": {"name": "cg", "damping": options.damping, "tolerance": options.truth, "max_steps": options.plain},
        f"LiSSA (sni), {options.lissa} steps": {"name": "sni", "damping": options.damping, "max_steps": options.lissa, "batch_size": 32},
    }
    mlp = Bench(problem, model, ["mlp"], 100)
    rows.append(("EK-FAC, MLPs alone", *mlp.scores(cheap["EK-FAC"])))
    print(f"  {rows[-1][0]}: {spearman(rows[-1][1], truth).mean():.3f}", flush=True)
    for name, table in (cheap if options.quick else {**cheap, **solvers}).items():
        rows.append((name, *bench.scores(table)))
        print(f"  {name}: {spearman(rows[-1][1], truth).mean():.3f}, {rows[-1][2]:.0f} s", flush=True)
    print("\n| method | rank correlation | milliseconds per pair | residual |\n|---|---|---|---|")
    for name, scores, seconds, said in rows:
        each = spearman(scores, truth)
        print(f"| {name} | {each.mean():.3f} | {1000 * seconds / scores.size:.2f} | {residual(said, options.train)} |")


if __name__ == "__main__":
    main(sys.argv[1:])
