"""Problems to sample from: what a test gives them."""

import torch
from torch import nn
from torch.utils.data import TensorDataset

import tda
from tda.modules import inspect


class Given(tda.Problem):
    """A model, data and a likelihood as a test gives them; the model at its initial weights is the checkpoint."""

    def __init__(self, model, inputs, targets, likelihood=None, queries=5):
        self.made, self.inputs, self.targets, self.queries = model, inputs, targets, queries
        self.likelihood = likelihood or tda.Categorical()

    def model(self):
        return self.made

    def train_data(self):
        return TensorDataset(self.inputs, self.targets)

    def query_data(self):
        return TensorDataset(self.inputs[: self.queries] * 0.9, self.targets[: self.queries])


class Residual(nn.Module):
    """Nothing that is written out by hand: a skip connection, a norm, one parameter that is a number."""

    def __init__(self, width=6, classes=3):
        super().__init__()
        self.inner, self.norm, self.out = nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, classes)
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.out(self.norm(x + torch.tanh(self.inner(x)))) * self.temperature


def mlp(width=6, classes=3):
    return nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, classes))


def classes(make, dtype=torch.float32, examples=50, width=6):
    """A classification problem and its inspected model."""
    torch.manual_seed(0)
    model, inputs = make().to(dtype), torch.randn(examples, width, dtype=dtype)
    problem = Given(model, inputs, torch.randint(3, (examples,)))
    return problem, inspect(problem, model, problem.train_data())


class Words(nn.Module):
    """A language model of one mixing layer: (B, T) -> (B, T, V)."""

    def __init__(self, vocabulary=11, width=5):
        super().__init__()
        self.embedding, self.mix, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, width), nn.Linear(width, vocabulary)

    def forward(self, x):
        found = self.embedding(x)
        return self.head(torch.tanh(self.mix(found.cumsum(1))))


def words(dtype=torch.float32, reduction="sum", examples=20, tokens=6):
    """A language problem, some of whose tokens are ignored, and its inspected model."""
    torch.manual_seed(0)
    model, ids = Words().to(dtype), torch.randint(11, (examples, tokens + 1))
    targets = ids[:, 1:].clone()
    targets[1::3, -2:] = -100
    problem = Given(model, ids[:, :-1], targets, tda.TokenCategorical(reduction=reduction))
    problem.query_data = lambda: TensorDataset(ids[:4, :-1], targets[:4])
    return problem, inspect(problem, model, problem.train_data())
