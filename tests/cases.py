"""The fixed cases: three small networks and a small GPT with trained weights, data, and dense float64 scores to compare with.

    d   MLP 64-32-32-10, ReLU          UCI digits, standardised: 1,437 for training, 360 queries
    D   MLP 64-128-128-10, ReLU        the same
    C   three 3x3 convolutions         the digits as 1 x 16 x 16 images
    T   GPT-NeoX, 4 layers, 256 wide   2,000 documents of 128 tokens, 64 queries

d, D and C lie in tests/data. T is too large to commit: it is read from the folder that $TDA_CASES names, if any.
Truths are given for the first 8 queries x all training examples, in the library's convention: -(1/N) g_q^T (C + damping)^-1 g_i.
The names: graddot; {ekfac,kfac}_{emp,exp}_{heur,fix,d2}; in d and D {hess,ggn,bggn}_{fix,d2} as far as they are given. emp and exp:
the data's labels, or the exact expectation over the model's; heur: damping 0.1 x the layer's mean eigenvalue; fix: FIX_DAMPING[case]
for every layer; d2: 0.01. ggn and bggn: the exact generalised Gauss-Newton matrix, whole and layer by layer. hess: (H + damping I)^-1
with H's negative eigenvalues as they are.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

DATA = Path(__file__).parent / "data"
FIX_DAMPING = {"d": 3.2961089000065286e-04, "D": 3.661821551196395e-05, "C": 1.7318161219838357e-04, "T": 2.1815019189589226e-03}
COMMITTED = {"d": "digits.npz", "D": "digits.npz", "C": "digits16.npz"}


@dataclass(frozen=True)
class Case:
    """One case. Inputs are (N, ...) and (Q, ...); targets are class numbers, or the token ids themselves in case T.

    truth: name -> (8, N), float64.
    """

    name: str
    model: nn.Module
    train_inputs: Tensor
    train_targets: Tensor
    query_inputs: Tensor
    query_targets: Tensor
    truth: dict[str, Tensor]
    fix_damping: float


class MLP(nn.Module):
    """Linear layers fc0, fc1, ... with ReLU between them: (batch, in) -> (batch, out)."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.depth = len(widths) - 1
        for i in range(self.depth):
            self.add_module(f"fc{i}", nn.Linear(widths[i], widths[i + 1]))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.depth):
            x = self.get_submodule(f"fc{i}")(functional.relu(x) if i else x)
        return x


class CNN(nn.Module):
    """Three 3x3 convolutions and a linear layer: (batch, 1, 16, 16) -> (batch, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, stride=2)
        self.conv3 = nn.Conv2d(64, 64, 3, stride=2)
        self.fc = nn.Linear(64 * 3 * 3, 10)

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.conv1, self.conv2, self.conv3):
            x = functional.relu(conv(x))
        scores: Tensor = self.fc(x.flatten(1))
        return scores


def rotate(x: Tensor, width: int, base: float = 10000.0) -> Tensor:
    """Rotary position embedding of the first `width` channels. x: (batch, head, token, channel)."""
    steps = torch.arange(0, width, 2, dtype=torch.float32) / width  # float32 whatever the model is: the truths were computed so
    angle = torch.outer(torch.arange(x.shape[-2], dtype=torch.float32), 1.0 / base**steps).to(x.dtype)
    cos, sin = angle.cos(), angle.sin()
    half = width // 2
    left, right, rest = x[..., :half], x[..., half:width], x[..., width:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin, rest], -1)


class Attention(nn.Module):
    """Causal self-attention of GPT-NeoX; a quarter of each head's channels is rotated."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.dense = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        channels = width // self.heads
        query, key, value = self.query_key_value(x).view(batch, tokens, self.heads, 3 * channels).transpose(1, 2).chunk(3, -1)
        query, key = rotate(query, channels // 4), rotate(key, channels // 4)
        later = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
        weight = (query @ key.transpose(-1, -2) / math.sqrt(channels)).masked_fill(later, -math.inf).softmax(-1)
        mixed: Tensor = self.dense((weight @ value).transpose(1, 2).reshape(batch, tokens, width))
        return mixed


class FeedForward(nn.Module):
    """Two linear layers with GELU between them, four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(width, 4 * width)
        self.dense_4h_to_h = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dense_4h_to_h(functional.gelu(self.dense_h_to_4h(x)))
        return out


class Layer(nn.Module):
    """Attention and feed-forward, each behind its LayerNorm and beside a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(width)
        self.post_attention_layernorm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = FeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.input_layernorm(x))
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Trunk(nn.Module):
    """Embedding, layers and the last LayerNorm: (batch, token) -> (batch, token, width)."""

    def __init__(self, vocabulary: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embed_in = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(depth))
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_in(ids)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.final_layer_norm(x)
        return out


class GPT(nn.Module):
    """GPT-NeoX with the names of transformers' GPTNeoXForCausalLM: (batch, token) -> (batch, token, vocabulary)."""

    def __init__(self, vocabulary: int = 512, width: int = 256, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.gpt_neox = Trunk(vocabulary, width, depth, heads)
        self.embed_out = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.embed_out(self.gpt_neox(ids))
        return logits


def tracked_layers(model: nn.Module) -> list[str]:
    """The linear layers that the truths of case T cover: those inside the blocks."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "embed_out"]


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Per-example loss (batch,): cross-entropy of the class, or of the next token summed over the sequence."""
    if outputs.ndim == targets.ndim + 1 and targets.ndim > 1:
        return functional.cross_entropy(outputs[:, :-1].transpose(1, 2), targets[:, 1:], reduction="none").sum(1)
    return functional.cross_entropy(outputs, targets, reduction="none")


def new_model(name: str) -> nn.Module:
    """The case's network without its weights."""
    return {"d": lambda: MLP([64, 32, 32, 10]), "D": lambda: MLP([64, 128, 128, 10]), "C": CNN, "T": GPT}[name]()


def available(name: str) -> str | None:
    """None when the case can be loaded, else why not."""
    if name in COMMITTED:
        return None
    folder = os.environ.get("TDA_CASES")
    if not folder:
        return f"case {name} (13.7 MB of weights) is not committed; set TDA_CASES to the folder that holds {name}.safetensors"
    return None if (Path(folder) / f"{name}.safetensors").exists() else f"{name}.safetensors is not in TDA_CASES={folder}"


def load_case(name: str, dtype: torch.dtype = torch.float64, folder: Path | None = None) -> Case:
    """The case with model and inputs in `dtype`; the truths stay float64. folder: where to read it, if not from the places above."""
    folder = folder or (DATA if name in COMMITTED else Path(os.environ["TDA_CASES"]))
    model = new_model(name)
    model.load_state_dict(load_file(folder / f"{name}.safetensors"))
    train_inputs, train_targets, query_inputs, query_targets = _data(folder, name)
    size = len(train_inputs)
    with np.load(folder / f"truth_{name}.npz") as arrays:
        truth = {key: -torch.from_numpy(arrays[key]) / size for key in arrays}
    if train_inputs.is_floating_point():
        train_inputs, query_inputs = train_inputs.to(dtype), query_inputs.to(dtype)
    model = model.to(dtype).eval()
    return Case(name, model, train_inputs, train_targets, query_inputs, query_targets, truth, FIX_DAMPING[name])


def _data(folder: Path, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    own = folder / f"{name}.npz"
    with np.load(own if own.exists() else folder / COMMITTED[name]) as arrays:
        data = {key: torch.from_numpy(arrays[key]) for key in arrays}
    if name == "T":
        return data["ids_train"], data["ids_train"], data["ids_query"], data["ids_query"]
    return data["x_train"], data["y_train"], data["x_test"], data["y_test"]
