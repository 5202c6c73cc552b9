"""The mode under which models run: the numbers of the plain model, for one copy and for many."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from tda.sampling import kernels
from tda.sampling.kernels import Kernels


class Attends(nn.Module):
    """Linear layers with and without a bias, a product as GPT-2 writes it, and attention; everything on (B, T, I)."""

    def __init__(self, masked):
        super().__init__()
        self.masked, self.qkv, self.out = masked, nn.Linear(8, 24), nn.Linear(8, 8, bias=False)
        self.weight, self.bias = nn.Parameter(torch.randn(8, 8) / 3), nn.Parameter(torch.randn(8))

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 2, 12).transpose(1, 2).chunk(3, -1)
        tokens = x.shape[1]
        mask = {
            "causal": None,
            "all": torch.ones(tokens, tokens, dtype=torch.bool).tril(),
            "examples": torch.ones(len(x), 1, tokens, tokens).tril().log(),
            "inputs": (x[:, None, None, :, 0] > -9).expand(-1, 1, tokens, -1),
        }[self.masked]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None).transpose(1, 2).flatten(2)
        flat = torch.addmm(self.bias, mixed.reshape(-1, 8), self.weight).view(x.shape)
        return self.out(torch.tanh(flat))


@pytest.mark.parametrize("short", [1 << 16, 1], ids=["short", "long"])
@pytest.mark.parametrize("masked", ["causal", "all", "examples", "inputs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_and_gradients_are_those_of_the_plain_model(masked, dtype, short, monkeypatch):
    monkeypatch.setattr(kernels, "SHORT", short)
    torch.manual_seed(0)
    model, inputs = Attends(masked).to(dtype), torch.randn(3, 4, 5, 8, dtype=dtype)
    weights = {name: torch.stack([p.detach() * (1 + c / 10) for c in range(3)]).requires_grad_() for name, p in model.named_parameters()}
    plain = torch.stack([functional_call(model, {n: w[c] for n, w in weights.items()}, (inputs[c],)) for c in range(3)])
    wanted = torch.autograd.grad(plain.square().sum(), list(weights.values()))
    close = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}

    def together():
        return vmap(lambda w, x: functional_call(model, w, (x,)))(weights, inputs)

    def alone():
        return torch.stack([functional_call(model, {n: w[c] for n, w in weights.items()}, (inputs[c],)) for c in range(3)])

    for run in (together, alone):
        mode = Kernels()
        with mode.forwards():
            found = run()
        with mode.backwards():
            gradients = torch.autograd.grad(found.square().sum(), list(weights.values()))
        torch.testing.assert_close(found, plain, **close)
        torch.testing.assert_close(gradients, wanted, **close)


def test_no_weights_are_copied_for_each_example():
    layer, x = nn.Linear(64, 64), torch.randn(2, 512, 3, 64)
    weights = {name: torch.stack([p.detach()] * 2) for name, p in layer.named_parameters()}
    with Kernels().forwards(), torch.profiler.profile() as seen:
        vmap(lambda w, x: functional_call(layer, w, (x,)))(weights, x)
    names = {event.key for event in seen.key_averages()}
    assert "aten::baddbmm" in names
    assert "aten::bmm" not in names
