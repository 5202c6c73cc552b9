"""Peak memory of a run's work as queries and the corpus grow, on a small GPT.

    python -m tests.benchmarks.memory                        # minutes

Every row is a process of its own that fits EK-FAC, makes directions and scores, task by task as a worker does. Sequences are drawn as
they are read, so the corpus itself takes no room. peak: highest resident memory; start: the same with the model open and nothing done.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn

import tda

TOKENS, WORDS = 32, 256
CONFIG = """
problem = "tests.benchmarks.memory:Corpus"
store = "{folder}/store"
checkpoint = "{folder}/model.safetensors"
modules = ["gpt_neox.layers"]
{more}
[problem_options]
sequences = {sequences}
queries = {queries}
width = {width}
[[methods]]
name = "ekfac"
fisher = "empirical"
"""
#: (sequences, queries, width, further keys of the run).
ROWS = (
    (2000, 16, 64, ""),
    (20000, 16, 64, ""),
    *((400, queries, 256, more) for more in ("", "query_block = 16", "query_rank = 16") for queries in (16, 64, 256)),
)


class Drawn:
    """Sequences of different lengths, by id."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[dict[str, Tensor], Tensor]:
        length = int(lengths(self.count, self.seed)[i])
        tokens = torch.from_numpy(np.random.default_rng([self.seed, i]).integers(WORDS, size=length))
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, torch.cat([tokens[1:], torch.tensor([-100])])


def lengths(count: int, seed: int) -> np.ndarray:
    """Tokens of each sequence."""
    return 8 + (np.arange(count) * 2654435761 + seed) % (TOKENS - 7)


class Corpus(tda.Problem):
    """Random sequences, and a GPT-NeoX of two layers that knows nothing of them."""

    likelihood = tda.TokenCategorical()

    def __init__(self, sequences: int, queries: int, width: int) -> None:
        self.sequences, self.queries, self.width = sequences, queries, width

    def model(self) -> nn.Module:
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

        shape = {"hidden_size": self.width, "intermediate_size": 4 * self.width, "num_hidden_layers": 2, "num_attention_heads": 4}
        torch.manual_seed(0)
        config = GPTNeoXConfig(vocab_size=WORDS, max_position_embeddings=TOKENS, **shape)
        return GPTNeoXForCausalLM._from_config(config, attn_implementation="eager").eval()

    def predict(self, model: nn.Module, batch: Any) -> Tensor:
        logits: Tensor = model(**batch.inputs).logits
        return logits

    def train_data(self) -> Drawn:
        return Drawn(self.sequences, 0)

    def query_data(self) -> Drawn:
        return Drawn(self.queries, 1)

    def lengths(self, split: str) -> Any:
        return lengths(self.sequences, 0) if split == "train" else lengths(self.queries, 1)

    def collate(self, examples: list[Any]) -> Any:
        from tda.language.examples import collate

        return collate(examples, 0)


def measured(sequences: int, queries: int, width: int, more: str) -> dict[str, float]:
    """Megabytes of one row, in this process."""
    from flows.attribute import request_of
    from flows.config import load_config
    from tasks import directions, factors, plan, prepare, scores
    from tasks.subject import open_subject

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        state = Corpus(sequences, queries, width).model().state_dict()
        save_file({name: tensor.clone() for name, tensor in state.items()}, Path(folder) / "model.safetensors")
        file = Path(folder) / "run.toml"
        file.write_text(CONFIG.format(folder=folder, sequences=sequences, queries=queries, width=width, more=more))
        request = request_of(load_config(file))
        inputs = prepare.examine(request)
        decided = plan.plan(request, inputs).placed(f"file://{folder}/run")
        layers = range(len(open_subject(decided.first.subject).attributed.blocks))
        start = peak()
        for job in decided.first.fits.values():
            assert isinstance(job, factors.FactorJob)
            factors.create_factors(job)
            for sums in ("covariance", "eigenvalues"):
                for node in factors.leaves(job, sums):
                    factors.sum_shard(node)
                for level in factors.levels(job, sums):
                    for node in level:
                        factors.reduce_node(node)
                if sums == "covariance":
                    for layer in layers:
                        factors.decompose_layer((job, layer))
            factors.finish_factors(job)
        fitted, job = peak(), decided.first.scores
        for made in (scored.directions for scored in job.methods):
            for block in range(made.blocks):
                directions.make_directions((made, block))
            directions.finish(made)
        directed = peak()
        scores.create_results(job, {"train": None, "query": None}, {})
        shards, blocks = job.shape
        for block in range(blocks):
            for shard in range(shards):
                scores.score_shard((job, shard, block))
    return {"start": start, "fit": fitted, "directions": directed, "peak": peak(), "query_block": job.query_block}


def peak() -> float:
    """Highest resident memory so far, in 10^6 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def main(argv: list[str]) -> None:
    """One row where it is asked for, else a process for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", help="JSON of one row; prints its JSON")
    options = parser.parse_args(argv)
    if options.row:
        print(json.dumps(measured(*json.loads(options.row))))
        return
    table = Table(title="MB of one worker, highest until the stage's end", title_justify="left")
    for column in ("sequences", "queries", "width", "keys", "queries at a time", "start", "fit", "directions", "peak"):
        table.add_column(column, justify="left" if column == "keys" else "right")
    for row in ROWS:
        done = subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.memory", "--row", json.dumps(row)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(done.stderr)
        found = json.loads(done.stdout.splitlines()[-1])
        cells = [found["query_block"], *(f"{found[stage]:.0f}" for stage in ("start", "fit", "directions", "peak"))]
        table.add_row(*map(str, (*row[:3], row[3] or "-", *cells)))
    Console(width=140).print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
