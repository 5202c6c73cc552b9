"""Every kind of layer that is supported, in a small model, with the names of its blocks in the dense reference."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tda import Categorical, TokenCategorical
from tests.dense import Block
from tests.tda import models
from tests.tda.models import TOKENS, VOCABULARY, PixelMean, TokenMean


def reals(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randn(shape, generator=generator, dtype=torch.float64)


def ids(generator: torch.Generator) -> Tensor:
    return torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)


def padded(generator: torch.Generator) -> dict[str, Tensor]:
    length = int(torch.randint(1, TOKENS + 1, (), generator=generator))
    return {"x": torch.randn(TOKENS, 5, generator=generator, dtype=torch.float64), "attention_mask": torch.arange(TOKENS) < length}


@dataclass(frozen=True)
class Layer:
    """model: made in double precision with drawn weights. blocks: in the order of the parameters. direct: taken one example at a time."""

    model: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], Any]
    blocks: tuple[Block, ...]
    direct: frozenset[str] = frozenset()
    tokens: bool = False
    predict: Callable[[nn.Module, Any], Tensor] | None = None

    @property
    def likelihood(self) -> Categorical | TokenCategorical:
        return TokenCategorical() if self.tokens else Categorical()

    def build(self) -> nn.Module:
        torch.manual_seed(1)
        model = self.model().double().eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
        return model

    def examples(self, size: int, seed: int = 0) -> list[tuple[Any, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        return [(self.inputs(generator), self._target(generator)) for _ in range(size)]

    def _target(self, generator: torch.Generator) -> Tensor:
        if not self.tokens:
            return torch.randint(0, 3, (), generator=generator)
        target = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
        target[-1 - int(torch.randint(0, 2, (), generator=generator)) :] = -100
        return target


def blocks(*described: str) -> tuple[Block, ...]:
    """ "linear 0" and "full 1.weight 1.bias" are blocks; "conv*2 0" stands for the two groups of a convolution."""
    found = []
    for text in described:
        kind, *names = text.split()
        kind, _, groups = kind.partition("*")
        found += [Block(kind, tuple(names), g) for g in range(int(groups or 1))]
    return tuple(found)


def sequence(*modules: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(make() for make in modules))


def head(width: int) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(width, 3)


def conv(make: Callable[[], nn.Module], channels: int, *shape: int, groups: int = 1) -> Layer:
    return Layer(sequence(make, PixelMean, head(channels)), reals(*shape), blocks(f"conv*{groups} 0", "linear 2"))


def norm(make: Callable[[], nn.Module], *shape: int, kinds: str = "0.weight 0.bias") -> Layer:
    """A linear layer behind the norm would be as wide as all of its outputs: they are flattened."""
    width = int(torch.Size(shape).numel())
    return Layer(sequence(make, nn.Tanh, nn.Flatten, head(width)), reals(*shape), blocks(f"full {kinds}", "linear 3"))


LAYERS = {
    "Linear": Layer(sequence(lambda: nn.Linear(6, 4), nn.Tanh, head(4)), reals(6), blocks("linear 0", "linear 2")),
    "Linear without bias": Layer(sequence(lambda: nn.Linear(6, 4, bias=False), nn.Tanh, head(4)), reals(6), blocks("linear 0", "linear 2")),
    "subclass of Linear": Layer(sequence(lambda: models.OwnLinear(6, 4), nn.Tanh, head(4)), reals(6), blocks("linear 0", "linear 2")),
    "Linear over tokens": Layer(sequence(lambda: nn.Linear(5, 4), TokenMean, head(4)), reals(4, 5), blocks("linear 0", "linear 2")),
    "Linear over pixels": Layer(
        sequence(lambda: nn.Linear(5, 3), nn.Tanh, nn.Flatten, head(18)), reals(2, 3, 5), blocks("linear 0", "linear 3")
    ),
    "Linear over masked tokens": Layer(
        models.Pooled, padded, blocks("linear inner", "full norm.weight norm.bias", "linear out"), predict=lambda model, x: model(**x)
    ),
    "Linear called twice": Layer(models.Twice, reals(5), blocks("linear inner", "linear out")),
    "Linear tied to Linear": Layer(models.Reused, reals(4), blocks("linear first second", "linear out")),
    "transformers Conv1D": Layer(sequence(lambda: Conv1D(4, 6), nn.Tanh, head(4)), reals(6), blocks("transposed 0", "linear 2")),
    "transformers Conv1D over tokens": Layer(
        sequence(lambda: Conv1D(4, 5), TokenMean, head(4)), reals(4, 5), blocks("transposed 0", "linear 2")
    ),
    "Conv1d": conv(lambda: nn.Conv1d(2, 4, 3, stride=2, padding=1, dilation=2, bias=False), 4, 2, 9),
    "Conv1d in groups": conv(lambda: nn.Conv1d(4, 6, 3, padding=2, groups=2), 6, 4, 5, groups=2),
    "Conv1d same": conv(lambda: nn.Conv1d(2, 3, 3, padding="same", dilation=2), 3, 2, 6),
    "Conv2d depthwise": conv(lambda: nn.Conv2d(3, 6, 3, padding=1, groups=3), 6, 3, 4, 5, groups=3),
    "Conv2d dilated": conv(lambda: nn.Conv2d(2, 4, (3, 2), dilation=(2, 1), stride=(1, 2), bias=False), 4, 2, 7, 6),
    "Conv2d same": conv(lambda: nn.Conv2d(2, 3, 3, padding="same", dilation=(1, 2)), 3, 2, 4, 5),
    "Conv2d same reflected": conv(lambda: nn.Conv2d(2, 3, 3, padding="same", padding_mode="reflect"), 3, 2, 4, 5),
    "Conv2d valid": conv(lambda: nn.Conv2d(2, 3, 2, padding="valid"), 3, 2, 4, 3),
    "Conv2d of one pixel": conv(lambda: nn.Conv2d(2, 3, 3), 3, 2, 3, 3),
    "Embedding": Layer(sequence(lambda: nn.Embedding(VOCABULARY, 4), TokenMean, head(4)), ids, blocks("embedding 0", "linear 2")),
    "Embedding with padding": Layer(
        sequence(lambda: nn.Embedding(VOCABULARY, 4, padding_idx=2), TokenMean, head(4)), ids, blocks("embedding 0", "linear 2")
    ),
    "Embedding of positions (1, T)": Layer(models.Positions, ids, blocks("embedding token", "embedding position", "linear out")),
    "Embedding tied to Linear": Layer(models.Head, ids, blocks("tied embedding head", "linear middle"), tokens=True),
    "LayerNorm": norm(lambda: nn.LayerNorm(5), 5),
    "LayerNorm over tokens": norm(lambda: nn.LayerNorm(5), 3, 5),
    "LayerNorm over a matrix": norm(lambda: nn.LayerNorm((3, 5)), 2, 3, 5),
    "LayerNorm without bias": norm(lambda: nn.LayerNorm(5, bias=False), 3, 5, kinds="0.weight"),
    "RMSNorm": norm(lambda: nn.RMSNorm(5), 3, 5, kinds="0.weight"),
    "RMSNorm as transformers write it": norm(lambda: models.HFRMSNorm(5), 3, 5, kinds="0.weight"),
    "GroupNorm": norm(lambda: nn.GroupNorm(2, 4), 4),
    "GroupNorm over pixels": norm(lambda: nn.GroupNorm(2, 4), 4, 2, 3),
    "BatchNorm1d": norm(lambda: nn.BatchNorm1d(5), 5),
    "BatchNorm1d over time": norm(lambda: nn.BatchNorm1d(4), 4, 3),
    "BatchNorm2d": norm(lambda: nn.BatchNorm2d(3), 3, 2, 3),
    "parameters of the model's own": Layer(
        models.Bare, reals(TOKENS, 5), blocks("full position", "full scale", "full shift", "full temperature", "linear out")
    ),
    "Bilinear, a diagonal": Layer(
        models.Bilinear, reals(12), blocks("diagonal inner.weight", "linear out"), direct=frozenset({"inner.weight"})
    ),
    "MultiheadAttention": Layer(
        models.Attention,
        reals(TOKENS, 4),
        blocks(*(f"full attention.{n}" for n in models.ATTENTION), "linear out"),
        direct=frozenset(f"attention.{n}" for n in models.ATTENTION),
    ),
    "LSTM": Layer(
        models.Recurrent,
        reals(TOKENS, 4),
        blocks(*(f"full lstm.{n}" for n in models.LSTM), "linear out"),
        direct=frozenset(f"lstm.{n}" for n in models.LSTM),
    ),
    "TransformerEncoderLayer, sequence first": Layer(
        models.Encoder,
        reals(TOKENS, 4),
        blocks(
            *(f"full layer.self_attn.{n}" for n in models.ATTENTION),
            "linear layer.linear1",
            "linear layer.linear2",
            "full layer.norm1.weight layer.norm1.bias",
            "full layer.norm2.weight layer.norm2.bias",
            "linear out",
        ),
        direct=frozenset(f"layer.self_attn.{n}" for n in models.ATTENTION),
    ),
    "GPT-2": Layer(
        models.gpt2,
        ids,
        blocks(
            "tied transformer.wte lm_head",
            "embedding transformer.wpe",
            f"full {models.GPT2}.ln_1.weight {models.GPT2}.ln_1.bias",
            f"transposed {models.GPT2}.attn.c_attn",
            f"transposed {models.GPT2}.attn.c_proj",
            f"full {models.GPT2}.ln_2.weight {models.GPT2}.ln_2.bias",
            f"transposed {models.GPT2}.mlp.c_fc",
            f"transposed {models.GPT2}.mlp.c_proj",
            "full transformer.ln_f.weight transformer.ln_f.bias",
        ),
        tokens=True,
        predict=models.logits,
    ),
    "GPT-NeoX": Layer(
        models.neox,
        ids,
        blocks(
            "embedding gpt_neox.embed_in",
            f"full {models.NEOX}.input_layernorm.weight {models.NEOX}.input_layernorm.bias",
            f"full {models.NEOX}.post_attention_layernorm.weight {models.NEOX}.post_attention_layernorm.bias",
            f"linear {models.NEOX}.attention.query_key_value",
            f"linear {models.NEOX}.attention.dense",
            f"linear {models.NEOX}.mlp.dense_h_to_4h",
            f"linear {models.NEOX}.mlp.dense_4h_to_h",
            "full gpt_neox.final_layer_norm.weight gpt_neox.final_layer_norm.bias",
            "linear lm_head",
        ),
        tokens=True,
        predict=models.logits,
    ),
}


def padding(mode: str, groups: int) -> Layer:
    return conv(lambda: nn.Conv2d(4, 4, 3, stride=(1, 2), padding=(1, 2), padding_mode=mode, groups=groups), 4, 4, 5, 5, groups=groups)


LAYERS |= {
    f"Conv2d {m} in {g} groups": padding(m, g) for m, g in itertools.product(("zeros", "reflect", "replicate", "circular"), (1, 2, 4))
}
