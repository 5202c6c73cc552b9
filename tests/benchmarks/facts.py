"""What the models of `tda.problems.facts` know: first choices that are right, before and after the fine-tuning.

python -m tests.benchmarks.facts                                  # the small ones, half a minute on one core
python -m tests.benchmarks.facts docs/examples/facts-full.toml    # those of a configuration
"""

import copy
import sys
import time

import torch
from torch import nn

from flows.config import load_config
from tda.carried import shift
from tda.methods import parse
from tda.methods.sweep import expand
from tda.problem import load_problem
from tda.problems.facts import answered, cloze


def main(argv: list[str]) -> None:
    """Print a row per training."""
    torch.set_num_threads(1)
    config = load_config(argv[0] if argv else "docs/examples/facts-small.toml")
    swept = next(each for each in expand(config.methods) if each.table["name"] == "multistage")
    stage = parse(swept.table).pretraining
    corpus, questions = load_problem(stage.problem, stage.problem_options), load_problem(config.problem, config.problem_options)
    world = corpus.world
    print(f"{len(world.facts)} facts, {len(world.documents)} documents, {len(world.words)} words, {len(questions.query_data())} queries\n")
    print("| seed | facts completed | queries answered before | questions taught | queries answered | facts still | shift | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for seed in range(3):
        row = trained(corpus, questions, seed)
        print(f"| {seed} | " + " | ".join(f"{value:.1%}" for value in row[:-1]) + f" | {row[-1]:.0f} |", flush=True)


def trained(corpus, questions, seed: int) -> list[float]:
    """Shares that are right, the relative shift of all weights, and processor seconds of both trainings."""

    def right(model: nn.Module, texts) -> float:
        return float(answered(questions, model, texts).float().mean())

    torch.manual_seed(seed)
    model, started = corpus.model(), time.process_time()
    corpus.fit(model, corpus.train_data(), seed=seed, on_checkpoint=lambda **_: None)
    before = copy.deepcopy(model).eval()
    row = [right(before, cloze(corpus)), right(before, questions.query_data())]
    questions.fit(model, questions.train_data(), seed=seed, on_checkpoint=lambda **_: None)
    spent = time.process_time() - started
    weights = [dict(each.named_parameters()) for each in (model.eval(), before)]
    row += [right(model, texts) for texts in (questions.train_data(), questions.query_data(), cloze(corpus))]
    return [*row, shift(weights[0], weights[1], list(weights[0])), spent]


if __name__ == "__main__":
    main(sys.argv[1:])
