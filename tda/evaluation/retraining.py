"""Retraining on subsets: the truth that attributions predict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from tda.data import batches, load_batch
from tda.device import CPU
from tda.problem import Batch, Problem, training_device
from tda.stacked import fit_stack

#: So many models are trained at once: fewer leave time to Python, more leave the cache (python -m tests.benchmarks.lds --timing).
STACK = 64
#: Numbers of stacked parameters: large models are trained fewer at once.
NUMBERS = 1 << 24
#: Queries measured at a time.
BATCH = 256


def retrain(
    problem: Problem, dataset: Any, ids: Sequence[int], seed: int, *, dtype: torch.dtype | None = None, device: torch.device = CPU
) -> nn.Module:
    """A fresh model trained by `problem.fit` on examples `ids` of the dataset, in eval mode; as a run trains its checkpoint."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = problem.model().to(device=training_device(problem, device), dtype=dtype)
        problem.fit(model, Subset(dataset, list(ids)), seed=seed, on_checkpoint=_ignore)
    return model.to(device).eval()


def _ignore(*_: Any, **__: Any) -> None:
    """What the training reports is not needed here."""


def measure(problem: Problem, model: nn.Module, queries: Any) -> Tensor:
    """The measurement of every query under a model in eval mode, (query,) float64; from the model's outputs in float64."""
    like = next(model.parameters())
    with torch.no_grad():
        found = _measured(problem, queries, like, lambda batch: problem.predict(model, batch)[None])
    return found[0]


def measure_stack(
    problem: Problem, dataset: Any, queries: Any, subsets: Sequence[Sequence[int]], seeds: Sequence[int], **options: Any
) -> Tensor:
    """As `retrain` and `measure` for each pair (subset, seed), (model, query) float64, with all models trained at once."""
    stack = fit_stack(problem, dataset, subsets, seeds, **options)
    return _measured(problem, queries, next(iter(stack.parameters.values())), stack.outputs)


def _measured(problem: Problem, queries: Any, like: Tensor, outputs: Callable[[Batch], Tensor]) -> Tensor:
    parts = []
    for ids in batches(range(len(queries)), BATCH):
        batch = load_batch(problem, queries, ids, dtype=like.dtype, device=like.device)
        parts.append(torch.stack([problem.measurement(each.double(), batch.targets).double() for each in outputs(batch)]))
    return torch.cat(parts, 1).cpu()


def retrained(
    problem: Problem,
    dataset: Any,
    queries: Any,
    subsets: Sequence[Sequence[int]],
    seeds: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device = CPU,
    stacked: bool = True,
) -> Tensor:
    """Measurements after retraining on each subset with its seed, (model, query) float64.

    stacked: train up to STACK models on subsets of one size at once, which needs `unstackable` to have nothing to say; else one by one,
    with the same numbers up to rounding.
    """
    if not stacked:
        each = zip(subsets, seeds, strict=True)
        return torch.stack(
            [measure(problem, retrain(problem, dataset, ids, seed, dtype=dtype, device=device), queries) for ids, seed in each]
        )
    with torch.random.fork_rng(devices=[]):
        parameters = sum(parameter.numel() for parameter in problem.model().parameters())
    count = max(1, min(STACK, NUMBERS // parameters))
    found: list[Tensor] = [torch.empty(0)] * len(subsets)
    for size in sorted({len(ids) for ids in subsets}):
        places = [place for place, ids in enumerate(subsets) if len(ids) == size]
        for some in batches(places, count):
            mine = [subsets[p] for p in some], [seeds[p] for p in some]
            part = measure_stack(problem, dataset, queries, *mine, dtype=dtype, device=device)
            for place, values in zip(some, part, strict=True):
                found[place] = values
    return torch.stack(found)
