"""Plain training as data: SGD with momentum on shuffled batches. A problem that states its recipe needs no `fit` of its own.

Because it is plain, many models can be trained by it at once (`tda.stacked`), each as if it were alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tda.errors import InputError

if TYPE_CHECKING:
    from tda.problem import Batch, Problem


@dataclass(frozen=True)
class Recipe:
    """SGD: w <- w - learning_rate * b, where b <- momentum * b + grad + weight_decay * w + proximity * (w - w_0).

    grad is of the mean loss over a batch; batches are the consecutive pieces of a fresh random order in every epoch, the last one
    possibly smaller. w_0 are the weights that training starts from: proximity a adds (a/2) ||w - w_0||^2 to the objective, as fine-tuning
    does whose pre-training is to be attributed (`tda.methods.multistage`).

    Raises:
        InputError: a number is out of its range.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    proximity: float = 0.0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            _check(name, getattr(self, name), lambda value: isinstance(value, int) and value >= 1, "a whole number of at least 1")
        _check("learning_rate", self.learning_rate, lambda value: 0 < value < math.inf, "a number above 0")
        _check("momentum", self.momentum, lambda value: 0 <= value < 1, "a number in [0, 1)")
        for name in ("weight_decay", "proximity"):
            _check(name, getattr(self, name), lambda value: 0 <= value < math.inf, "a number of at least 0")

    @property
    def pull(self) -> float:
        """What the training adds to every eigenvalue of the loss's curvature: weight decay and proximity."""
        return self.weight_decay + self.proximity

    def steps(self, examples: int) -> int:
        """Optimizer steps of one epoch over so many examples."""
        return -(-examples // self.batch_size)


def _check(name: str, value: Any, good: Callable[[Any], bool], wanted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not good(value):
        raise InputError(f"the recipe's {name} is {value!r}; it must be {wanted}")


def orders(recipe: Recipe, examples: int, seed: int) -> Iterator[Tensor]:
    """The order of the examples in each epoch, (examples,) int64: a function of the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(recipe.epochs):
        yield torch.randperm(examples, generator=generator)


def train(problem: Problem, recipe: Recipe, model: nn.Module, dataset: Any, *, seed: int, on_checkpoint: Callable[..., None]) -> None:
    """Train `model` in place on a map-style dataset, and call `on_checkpoint` after every epoch (see docs/problems.md).

    The whole dataset is held in memory, in the model's dtype and on its device.
    """
    whole = load_all(problem, dataset, next(model.parameters()))
    optimizer = torch.optim.SGD(model.parameters(), recipe.learning_rate, recipe.momentum, weight_decay=recipe.weight_decay)
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    start = [parameter.detach().clone() for parameter in learnt] if recipe.proximity else []
    model.train()
    step = 0
    for order in orders(recipe, len(dataset), seed):
        for ids in order.to(whole.targets.device).split(recipe.batch_size):
            batch = rows(whole, ids)
            optimizer.zero_grad()
            problem.likelihood.loss(problem.predict(model, batch), batch.targets).mean().backward()
            for parameter, first in zip(learnt, start, strict=False):  # none without a proximity
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.detach() - first, alpha=recipe.proximity)
            optimizer.step()
            step += 1
        on_checkpoint(model=model, learning_rate=recipe.learning_rate, step=step, momentum=recipe.momentum, weight_decay=recipe.pull)


def load_all(problem: Problem, dataset: Any, like: Tensor) -> Batch:
    """The whole dataset as one batch, in the dtype and on the device of `like`."""
    from tda.data import length, load_batch

    return load_batch(problem, dataset, range(length(dataset, "train")), dtype=like.dtype, device=like.device)


def rows(batch: Batch, ids: Tensor) -> Batch:
    """Examples of a batch by their places: ids (...) gives leaves (..., *example)."""
    return type(batch)(tree_map(lambda leaf: leaf[ids], batch.inputs), batch.targets[ids])
