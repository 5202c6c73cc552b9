"""What multi-stage influence costs beside a single stage, on a small GPT: two checkpoints, two training sets of one size.

    python -m tests.benchmarks.stages --sequences 400 --queries 64                    # with $TDA_CASES case T, else a smaller one

Prints the seconds of work of every stage of two runs by `tda run`'s own clock, with EK-FAC at the last checkpoint and with `multistage`
over both, and their ratio. Nothing is shared: each run has a store of its own. What both have and does not grow with the data (a report)
is left out. --check VALUE ends with status 1 where the ratio is above it.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import tda
from tests import cases
from tests.benchmarks.ours import TRACKED, Examples

#: Where no case T is at hand.
SMALL = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
TOKENS = 32

CONFIG = """
problem = "tests.benchmarks.stages:Stage"
checkpoint = "{folder}/finetuned.safetensors"
store = "{folder}/store"
modules = {modules}
self_influence = false
{more}
[problem_options]
part = 1
sequences = {sequences}
queries = {queries}
[cluster]
workers = 1
[[methods]]
"""
SINGLE = """name = "ekfac"
fisher = "empirical"
damping = 1e-2
"""
MULTI = """name = "multistage"
fisher = "empirical"
proximity = 1e-2
[methods.pretraining]
problem = "tests.benchmarks.stages:Stage"
problem_options = {{ part = 0, sequences = {sequences}, queries = {queries} }}
checkpoint = "{folder}/pretrained.safetensors"
damping = 1e-2
"""
#: Not of the method: the same in both runs, or once per run.
APART = ("report", "total")


class Stage(tda.Problem):
    """Sequences of case T, or drawn ones: those of part 0 are the pre-training's, of part 1 the fine-tuning's."""

    likelihood = tda.TokenCategorical()

    def __init__(self, part: int, sequences: int, queries: int) -> None:
        self.part, self.sequences, self.queries = part, sequences, queries

    def model(self) -> nn.Module:
        if not cases.available("T"):
            return cases.load_case("T", torch.float32).model
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

        torch.manual_seed(0)
        return GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, max_position_embeddings=TOKENS, tie_word_embeddings=False)).eval()

    def predict(self, model: nn.Module, batch: Any) -> Tensor:
        found = model(batch.inputs)
        logits: Tensor = found if isinstance(found, Tensor) else found.logits
        return logits

    def train_data(self) -> Examples:
        return self._examples(range(self.part * self.sequences, (self.part + 1) * self.sequences))

    def query_data(self) -> Examples:
        return self._examples(range(-self.queries, 0))

    def _examples(self, places: range) -> Examples:
        if not cases.available("T"):
            every = cases.load_case("T", torch.float32).train_inputs
        else:
            every = torch.randint(SMALL["vocab_size"], (4096, TOKENS), generator=torch.Generator().manual_seed(1))
        tokens = every[torch.tensor(list(places)) % len(every)]
        return Examples(tokens, torch.cat([tokens[:, 1:], tokens.new_full((len(tokens), 1), -100)], 1))


def seconds(folder: Path, method: str, options: argparse.Namespace) -> dict[str, float]:
    """Of each stage of a run in a fresh store."""
    from flows.attribute import attribute_run
    from flows.config import load_config

    folder.mkdir()
    model = Stage(1, options.sequences, options.queries).model()
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(2)
    moved = {name: t + 0.01 * t.float().std() * torch.randn(t.shape, generator=generator) if t.ndim > 1 else t for name, t in state.items()}
    for name, tensors in (("pretrained", state), ("finetuned", moved)):
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / f"{name}.safetensors")
    fields = {"folder": folder, "sequences": options.sequences, "queries": options.queries, "more": options.more}
    file = folder / "run.toml"
    file.write_text((CONFIG + method).format(**fields, modules=json.dumps(TRACKED)))
    summary = attribute_run(load_config(file))
    timings = tda.open_run(summary.store, summary.run_id).manifest["timings"]
    return {stage: timing["compute"] for stage, timing in timings.items() if stage not in APART}


def main(argv: list[str]) -> int:
    """Both runs, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=400)
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--more", default="", help="further keys of both runs, as TOML")
    parser.add_argument("--check", type=float)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        found = {name: seconds(Path(folder) / name, method, options) for name, method in (("single", SINGLE), ("multi", MULTI))}
    for name, stages in found.items():
        for stage, took in stages.items():
            print(f"{name:8}{stage:44}{took:8.2f}")
    totals = {name: sum(stages.values()) for name, stages in found.items()}
    ratio = totals["multi"] / totals["single"]
    print(f"single stage {totals['single']:.2f} s, multi-stage {totals['multi']:.2f} s: {ratio:.2f} times")
    return int(options.check is not None and ratio > options.check)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
