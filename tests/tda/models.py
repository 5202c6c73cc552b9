"""Small models, one for each way in which layers are put together."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

VOCABULARY = 7
TOKENS = 4


class OwnLinear(nn.Linear):
    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight, self.bias)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.out = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.out(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Head(nn.Module):
    """Embedding and a linear head of one weight."""

    def __init__(self):
        super().__init__()
        self.embedding, self.middle, self.head = nn.Embedding(VOCABULARY, 4), nn.Linear(4, 4), nn.Linear(4, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(torch.tanh(self.middle(self.embedding(x))))


class HFRMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class Positions(nn.Module):
    """Learned positions as Hugging Face adds them: ids of shape (1, T)."""

    def __init__(self):
        super().__init__()
        self.token, self.position, self.out = nn.Embedding(VOCABULARY, 4), nn.Embedding(TOKENS, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.token(x) + self.position(torch.arange(x.shape[1], device=x.device)[None])).mean(1))


class Pooled(nn.Module):
    """Masked mean over the tokens, so that padding reaches no gradient."""

    def __init__(self):
        super().__init__()
        self.inner, self.norm, self.out = nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x, attention_mask):
        weight = attention_mask.to(x.dtype)[..., None]
        return self.out((self.norm(torch.tanh(self.inner(x))) * weight).sum(1) / weight.sum(1))


class Bare(nn.Module):
    """Parameters of the model's own: a scale, a shift, a class token's worth of positions (1, T, width), a temperature."""

    def __init__(self):
        super().__init__()
        self.position, self.scale, self.shift = (nn.Parameter(torch.zeros(s)) for s in ((1, TOKENS, 5), (5,), (5,)))
        self.temperature, self.out = nn.Parameter(torch.zeros(())), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(torch.tanh((x + self.position) * self.scale + self.shift).mean(1) * self.temperature)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        return self.out(self.lstm(x)[0][:, -1])


class Encoder(nn.Module):
    """PyTorch's encoder layer, sequence first as it is by default."""

    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.layer(x.transpose(0, 1)).mean(0))


class Bilinear(nn.Module):
    """An operation that we do not know, with more parameters than an exact block may have."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Bilinear(12, 12, 8, bias=False), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.inner(x, x)))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=TOKENS, n_embd=4, n_layer=1, n_head=2))


def neox() -> nn.Module:
    size = {"vocab_size": VOCABULARY, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 1}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**size, max_position_embeddings=TOKENS, tie_word_embeddings=False))


def logits(model: nn.Module, inputs: Any) -> Tensor:
    return model(inputs, use_cache=False).logits


class PixelMean(nn.Module):
    """(batch, channels, ...) -> (batch, channels)."""

    def forward(self, x):
        return torch.tanh(x).flatten(2).mean(2)


class TokenMean(nn.Module):
    """(batch, tokens, width) -> (batch, width)."""

    def forward(self, x):
        return torch.tanh(x).mean(1)


#: Where the transformers' layers lie, and the parameters of PyTorch's fused modules.
NEOX = "gpt_neox.layers.0"
GPT2 = "transformer.h.0"
ATTENTION = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
LSTM = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
