"""What both sides of tests.benchmarks.sampling sample: the model, the data and the settings, without a word of either library.

mlp     MLP 64-32-32-10 with trained weights, 1,437 digits and 360 queries (case d)
gpt     GPT-NeoX, 2 layers, 64 wide, 4 heads, 256 words, 32 tokens; 256 sequences and 32 queries of random tokens
gpt128  the same 128 wide, 1,000 words, 64 tokens
gpt32   the same 32 wide, 64 words, 16 tokens
"""

import argparse
import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tests import cases

#: Width, words, tokens.
GPTS = {"gpt32": (32, 64, 16), "gpt": (64, 256, 32), "gpt128": (128, 1000, 64)}
BEFORE = 2
NAMES = ("mlp", *GPTS)
#: Step size of the paper's convention, which both libraries follow; n_beta, localisation, examples of a step.
SETTINGS = {"mlp": (1e-5, 200.0, 100.0, 64), **dict.fromkeys(GPTS, (1e-6, 100.0, 100.0, 32))}


class Sampled(NamedTuple):
    """A model and what is evaluated; of a GPT, targets are the inputs shifted by one."""

    model: nn.Module
    train: tuple[Tensor, Tensor]
    query: tuple[Tensor, Tensor]


def load(name: str) -> Sampled:
    """In float32."""
    if name == "mlp":
        case = cases.load_case("d", torch.float32)
        layers = [(f"fc{i}", case.model.get_submodule(f"fc{i}")) for i in range(3)]
        model = nn.Sequential(OrderedDict([layers[0], ("relu0", nn.ReLU()), layers[1], ("relu1", nn.ReLU()), layers[2]]))
        return Sampled(model, (case.train_inputs, case.train_targets), (case.query_inputs, case.query_targets))
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    logging.getLogger("transformers").setLevel(logging.ERROR)
    width, words, tokens = GPTS[name]
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokens,
        bos_token_id=0,
        eos_token_id=0,
    )
    ids = torch.randint(words, (288, tokens + 1), generator=torch.Generator().manual_seed(0))
    return Sampled(GPTNeoXForCausalLM(config).eval(), (ids[:256, :-1], ids[:256, 1:]), (ids[256:, :-1], ids[256:, 1:]))


def per_run(run: Callable[[int], tuple[float, float]], draws: int, repeats: int) -> dict[str, float]:
    """Seconds and processor seconds of so many draws: the least of some runs with them and BEFORE more, less that of runs with BEFORE.

    So what is done once is left out, and what others do on the machine as far as possible. run: draws -> both clocks.
    """
    run(BEFORE)
    short, long = zip(*((run(BEFORE), run(BEFORE + draws)) for _ in range(repeats)), strict=True)
    clocks = [min(each[clock] for each in long) - min(each[clock] for each in short) for clock in range(2)]
    return {"seconds": clocks[0], "processor": clocks[1]}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Of either side."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", choices=NAMES, required=True)
    for name, default in (("chains", 1), ("draws", 20), ("threads", 1), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--onednn", action="store_true", help="the peer's float32 products on oneDNN")
    parser.add_argument("--compiled", action="store_true", help="ours, compiled")
    found = parser.parse_args(argv)
    torch.set_num_threads(found.threads)
    return found
